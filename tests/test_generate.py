"""The token loop and `Model`: what a user sees of the text, its end, its errors and its numbers."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from engine_doubles import ScriptedEngine, StockEngine

from edgeinfer.errors import EngineError, PromptError
from edgeinfer.generate import Generation, TextStream, generate
from edgeinfer.model import Model, load

DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
STORIES = Path(DATA or "", "lm/stories260K.gguf")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}Once{% endif %}"
)


def run(pieces, prompt=(1, 2, 3), context_length=100, **options):
    generation = Generation()
    engine = ScriptedEngine(pieces, context_length)
    shown = list(generate(engine, None, prompt, generation, **options))
    assert "".join(shown) == generation.text
    return shown, generation, engine


def test_text_comes_piece_by_piece_until_the_end_token():
    shown, generation, engine = run([b"One", b" two", b" three", None, b"never"])
    assert shown == ["One", " two", " three"]
    assert generation.tokens == [0, 1, 2]
    assert generation.finish == "end"
    assert generation.decodes == 3 and engine.position == 6


def test_characters_cut_by_tokens_are_shown_whole():
    cat = "🐈".encode()
    shown, generation, _ = run([b"a" + cat[:1], cat[1:3], cat[3:] + b"b", "é".encode()[:1], None])
    assert shown == ["a", "🐈b"]  # and never the unfinished last character
    assert len(generation.tokens) == 4


def test_bytes_that_are_no_text_are_dropped():
    assert run([b"a\xffb", b"\x80", b"c", None])[0] == ["ab", "c"]


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "finish"),
    [
        ([b"Hello", b" wor", b"ld\nUser", b": hi", None], ["User:"], "Hello world\n", "stop"),
        ([b"a", b"b", b"c", b"d", None], ["bcx", "cd"], "ab", "stop"),
        ([b"aEND", b"b", None], ["E", "END"], "a", "stop"),
        ([b"x", b"EN", None], ["END"], "xEN", "end"),
        ([b"EN", b"EN", b"D!", None], ["END"], "EN", "stop"),
        ([b"a", None], [""], "a", "end"),
    ],
)
def test_stop_strings_end_the_text_and_are_not_shown(pieces, stop, text, finish):
    shown, generation, _ = run(pieces, stop=stop)
    assert ("".join(shown), generation.finish) == (text, finish)


def test_stop_string_across_every_split_equals_a_search_in_the_whole_text():
    text = "ababcababab"
    for size in range(1, 6):
        pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
        stream = TextStream(["ababa"])
        assert "".join(stream.feed(piece) for piece in pieces if not stream.stopped) == "ababc"
        stream = TextStream(["abababz"])
        shown = "".join(stream.feed(piece) for piece in pieces)
        assert shown + stream.feed(b"", final=True) == text


def test_at_most_max_tokens():
    shown, generation, engine = run([b"a", b"b", b"c"], max_tokens=2)
    assert shown == ["a", "b"] and generation.finish == "length"
    assert engine.position == 4  # the last token needs no decode


def test_a_full_context_is_a_clear_end():
    shown, generation, engine = run([b"x"] * 50, context_length=10)
    assert generation.finish == "context"
    assert engine.position == 10 and len(generation.tokens) == 8
    assert run([b"x"] * 5, prompt=[1] * 10, context_length=10)[0] == ["x"]


def test_prompts_that_do_not_fit_are_refused_with_the_numbers():
    expected = r"has 1,011 tokens, but the context holds 100.*--ctx.*trained with 1,000"
    with pytest.raises(PromptError, match=expected):
        run([b"x"], prompt=[1] * 1011)
    with pytest.raises(PromptError, match="as long as this model was trained with"):
        run([b"x"], prompt=[1] * 1011, context_length=1000)
    with pytest.raises(PromptError, match="The prompt is empty"):
        run([b"x"], prompt=[])


def test_progress_of_the_prefill_is_one_growing_fraction():
    fractions = []
    run([None], prompt=[1] * 10, progress=fractions.append)
    assert fractions == [0.2, 0.6, 0.9]  # passes of 4, 4 and 2 tokens, each half done


def test_stats_count_what_was_read_after_the_first_token():
    class Engine(ScriptedEngine):
        def truncate(self, length):
            self.position = length

    engine = Engine([b"a", b"b", b"c", None], wait=0.01)
    engine.model.tokenize = lambda *_args, **_kwargs: [7, 8]
    engine.model.vocab = None
    model = Model(engine)
    assert model.stats.generated_tokens == 0 and model.stats.tokens_per_second is None
    list(model.generate("x"))
    stats = model.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.text) == (2, 3, "abc")
    assert stats.streamed_bytes_per_token == 10
    assert 30 < stats.tokens_per_second < 101
    assert stats.time_to_first_token_seconds < 0.01
    engine._next = 0
    list(model.generate("x", max_tokens=1))
    assert model.stats.tokens_per_second is None
    assert model.stats.streamed_bytes_per_token == 1000  # the pass that gave the only token


# From here on: real models.


@pytest.fixture(scope="module")
def stock():
    llama = llama_cpp.Llama(
        str(STORIES), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield llama
    llama.close()


@pytest.fixture
def model():
    with Model(StockEngine(STORIES)) as model:
        yield model


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory):
    """The small real model with a chat template in its metadata."""
    path = tmp_path_factory.mktemp("chat") / "chat.gguf"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", TEMPLATE]
    subprocess.run([*command, STORIES, path], check=True, capture_output=True)
    return path


@needs_data
@pytest.mark.parametrize("prompt", ["Once upon a time", "Lily saw a big red", "The 🐈 said"])
def test_greedy_text_equals_stock(model, stock, prompt):
    expected = stock(prompt, max_tokens=100, temperature=0, repeat_penalty=1.0)
    text = "".join(model.generate(prompt, max_tokens=100, temperature=0))
    assert text == expected["choices"][0]["text"]
    assert len(text) > 100
    assert model.stats.generated_tokens == expected["usage"]["completion_tokens"]
    assert model.stats.prompt_tokens == expected["usage"]["prompt_tokens"]


@needs_data
def test_seeded_text_is_repeatable(model):
    texts = [
        "".join(model.generate("Once", max_tokens=40, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@needs_data
def test_until_the_context_is_full():
    with Model(StockEngine(STORIES, context_length=64)) as model:
        list(model.generate("Once upon a time", temperature=0))
        assert model.finish == "context"
        assert model.stats.prompt_tokens + model.stats.generated_tokens == 65  # the last one needs no room


@needs_data
def test_a_stopped_generation_leaves_a_usable_model(model):
    expected = "".join(model.generate("Once upon a time", max_tokens=30, temperature=0))
    first = model.generate("Lily", temperature=0)
    assert next(first)
    first.close()
    assert model.finish is None and model.stats.generated_tokens == 1
    second = model.generate("Tom", temperature=0)
    next(second)
    assert "".join(model.generate("Once upon a time", max_tokens=30, temperature=0)) == expected
    with pytest.raises(EngineError, match="ended by a later one"):
        next(second)
    assert "".join(model.generate("Once upon a time", max_tokens=30, temperature=0)) == expected


@needs_data
def test_chat_uses_the_models_template_and_computes_only_what_is_new(chat_path):
    options = {"n_ctx": 512, "n_batch": 512, "n_threads": 1, "n_threads_batch": 1}
    llama = llama_cpp.Llama(str(chat_path), **options, verbose=False)
    with Model(StockEngine(chat_path)) as model:
        assert model.has_chat_template
        messages = [{"role": "user", "content": "Tell me a story about a dog."}]
        answer = "".join(model.chat(messages, max_tokens=20, temperature=0))
        expected = llama.create_chat_completion(messages, max_tokens=20, temperature=0, repeat_penalty=1.0)
        assert answer == expected["choices"][0]["message"]["content"]
        assert model.stats.prompt_tokens == expected["usage"]["prompt_tokens"]

        first_prompt = model.chat_tokens(messages)
        messages += [{"role": "assistant", "content": "Once" + answer}, {"role": "user", "content": "Go on."}]
        second_prompt = model.chat_tokens(messages)
        answer = "".join(model.chat(messages, max_tokens=20, temperature=0))
        expected = llama.create_chat_completion(messages, max_tokens=20, temperature=0, repeat_penalty=1.0)
        assert answer == expected["choices"][0]["message"]["content"]
        assert second_prompt[: len(first_prompt) - 3] == first_prompt[:-3]
        assert model.engine.prefilled[1] <= len(second_prompt) - len(first_prompt) + 3

        with pytest.raises(PromptError, match="chat template refused the messages: no tools here"):
            model.chat([{"role": "tool", "content": ""}])
        with pytest.raises(PromptError, match="no messages"):
            model.chat([])
    llama.close()


@needs_data
def test_chat_without_a_template_continues_the_text(model):
    options = {"max_tokens": 20, "temperature": 0}
    text = "".join(model.chat([{"role": "user", "content": "Once upon a time"}], **options))
    assert text == "".join(model.generate("Once upon a time", **options))


@needs_data
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens of at least 1, got 0"),
        ({"temperature": -1}, "temperature of 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature of 0 or more, got nan"),
        ({"top_p": 0}, "top_p above 0 and at most 1, got 0"),
        ({"seed": -1}, "seed of 0 to 4294967294, got -1"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate("Once", **options)


@needs_data
@pytest.mark.parametrize("options", [{"ctx": 0}, {"ctx": -1}, {"threads": 0}])
def test_load_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, got {value}"):
        load(**options)


def test_closed_model_says_so():
    model = Model(StockEngine(STORIES))
    list(model.generate("Once", max_tokens=2))
    model.close()
    model.close()
    assert model.stats.generated_tokens == 2
    with pytest.raises(EngineError, match="The model is closed"):
        model.generate("Once")


def test_import_is_light():
    code = "import sys, edgeinfer; print([m for m in ('numpy', 'llama_cpp', 'onnx') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
