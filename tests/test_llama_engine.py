"""The thin wrapper against stock llama.cpp (llama_cpp.Llama) and llama.cpp's own tokenizer answers."""

import ctypes
import gc
import os
from pathlib import Path

import llama_cpp
import numpy as np
import psutil
import pytest
from tiny import tiny_model

from edgeinfer.engines.llama import DecodeAborted, LlamaContext, LlamaModel, Sampler
from edgeinfer.errors import EngineError, ModelFileError, PromptError

DATA = os.environ.get("EDGEINFER_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
STORIES = Path(DATA or "", "lm/stories260K.gguf")
VOCABULARIES = sorted(Path(DATA or "", "vocab").glob("*.gguf"))


def open_model(path=STORIES, **options):
    options = {"load_mode": llama_cpp.LLAMA_LOAD_MODE_MMAP, "use_extra_bufts": False, **options}
    return LlamaModel(path, **options)


@pytest.fixture(scope="module")
def model():
    with open_model() as model:
        yield model


@pytest.fixture
def context(model):
    with LlamaContext(model, context_length=512, threads=1, outputs_max=64, flash_attention=False) as context:
        yield context


@pytest.fixture(scope="module")
def stock():
    """Stock llama.cpp with the same kernels, batch and threads; keeps the logits of every position."""
    llama = llama_cpp.Llama(
        str(STORIES), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    yield llama
    llama.close()


@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_token_ids_equal_llama_cpps_own_answers(path):
    with open_model(path, vocab_only=True) as model:
        # newline="": some of the texts hold carriage returns.
        with open(f"{path}.inp", encoding="utf-8", newline="") as file:
            texts = file.read().split("\n__ggml_vocab_test__\n")
        with open(f"{path}.out", encoding="utf-8") as file:
            expected = [[int(token) for token in line.split()] for line in file.read().split("\n")]
        assert len(texts) > 40
        for text, tokens in zip(texts, expected):
            assert model.tokenize(text, add_special=False, parse_special=False) == tokens, repr(text)


def test_vocabulary_equals_stock(model, stock):
    text = "Once upon a time, <s> there was a 火 and a 🐈.\n"
    for add_special in (True, False):
        for parse_special in (True, False):
            assert model.tokenize(text, add_special, parse_special) == stock.tokenize(
                text.encode(), add_bos=add_special, special=parse_special
            )
    assert model.vocab_size == stock.n_vocab() == 512
    assert model.train_context == int(stock.metadata["llama.context_length"])
    assert model.is_end(stock.token_eos()) and not model.is_end(stock.token_bos() + 50)
    assert model.token_bytes(stock.token_bos()) == b""
    tokens = model.tokenize(text, False, False)
    assert b"".join(map(model.token_bytes, tokens)).decode() == " " + text
    assert model.chat_template is None
    assert not model.has_encoder


def test_prefill_and_decode_logits_are_bit_identical_to_stock(model, context, stock):
    tokens = model.tokenize("Once upon a time, there was a little girl", True, False)
    stock.reset()
    stock.eval(tokens)
    context.decode(tokens, outputs="all")
    assert context.position == len(tokens)
    for i in range(len(tokens)):
        np.testing.assert_array_equal(context.logits(i), stock.scores[i])
    for _ in range(20):
        token = int(np.argmax(context.logits()))
        stock.eval([token])
        context.decode([token])
        np.testing.assert_array_equal(context.logits(), stock.scores[stock.n_tokens - 1])


def test_truncated_sequence_continues_as_if_the_rest_had_never_been(model, context):
    tokens = model.tokenize("Lily and Tom went to the park", True, False)
    context.decode(tokens)
    expected = context.logits().copy()
    context.decode(tokens)
    assert context.truncate(len(tokens) - 1) == context.position == len(tokens) - 1
    context.decode(tokens[-1:])
    np.testing.assert_allclose(context.logits(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="expected a length of 0 to"):
        context.truncate(400)


def test_greedy_and_seeded_samples(model, context):
    context.decode(model.tokenize("Once upon a time", True, False))
    greedy = Sampler(0, 0.9, None, model)
    assert greedy.sample(context) == int(np.argmax(context.logits()))
    draws = []
    for seed in (7, 7, 8):
        sampler = Sampler(1.5, 1.0, seed, model)
        draws.append([sampler.sample(context) for _ in range(30)])
        sampler.close()
    assert draws[0] == draws[1] != draws[2]
    narrow = Sampler(1.5, 1e-6, 3, model)  # a nucleus of one token
    assert {narrow.sample(context) for _ in range(20)} == {greedy.sample(context)}
    narrow.close()
    greedy.close()


def test_sampled_tokens_follow_the_distribution(model, context):
    """Frequencies of 4,000 draws against softmax(logits / temperature) computed here."""
    context.decode(model.tokenize("Once upon a time", True, False))
    context.decode(model.tokenize(" there was a", False, False)[-2:])
    temperature = 0.8
    scaled = context.logits().astype(np.float64) / temperature
    expected = np.exp(scaled - scaled.max())
    expected /= expected.sum()
    sampler = Sampler(temperature, 1.0, 1, model)
    draws = np.bincount([sampler.sample(context) for _ in range(4000)], minlength=model.vocab_size) / 4000
    sampler.close()
    np.testing.assert_allclose(draws, expected, atol=0.04)
    assert np.count_nonzero(draws) > 1


def test_aborted_decode_leaves_the_sequence_as_it_was(model):
    calls = []

    @llama_cpp.ggml_abort_callback
    def abort(_data):
        calls.append(1)
        return len(calls) == 30

    address = ctypes.cast(abort, ctypes.c_void_p).value
    tokens = model.tokenize("Once upon a time there was a dog", True, False)
    options = {"context_length": 64, "threads": 1, "flash_attention": False}
    with LlamaContext(model, **options, abort=address) as context:
        with pytest.raises(DecodeAborted):
            context.decode(tokens)
        assert context.position == 0
        context.decode(tokens)
        after_abort = context.logits().copy()
    with LlamaContext(model, **options) as context:
        context.decode(tokens)
        np.testing.assert_array_equal(context.logits(), after_abort)


def test_eval_callback_sees_the_graph(model):
    asked = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def on_node(_tensor, ask, data):
        asked.append((ask, data))
        return False

    options = {"cb_eval": ctypes.cast(on_node, ctypes.c_void_p).value, "cb_data": 42}
    with LlamaContext(model, context_length=64, threads=1, flash_attention=False, **options) as context:
        context.decode([1])
    assert len(asked) > 100 and set(asked) == {(True, 42)}


def test_bad_requests_are_refused(model, context, tmp_path):
    with pytest.raises(ValueError, match="1 to 512 tokens"):
        context.decode([])
    with pytest.raises(ValueError, match="at most 64 outputs, got 65 and 65"):
        context.decode([1] * 65, outputs="all")
    context.decode([1] * 500)
    with pytest.raises(EngineError, match="holds 512 tokens: 500 are used, 20 more do not fit"):
        context.decode([1] * 20)
    with pytest.raises(EngineError, match="could not compute 1 tokens"):
        context.decode([99999])
    assert context.position == 500
    with pytest.raises(PromptError, match="not valid Unicode"):
        model.tokenize("\udcff", True, False)
    missing = tmp_path / "none.gguf"
    with pytest.raises(EngineError, match="could not load .*none.gguf.*No such file"):
        open_model(missing)


def test_models_that_llama_cpp_refuses(tmp_path):
    whole = tiny_model(tmp_path, "llama", "Q8_0").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole.replace(b"llama", b"zlama"))
    with pytest.raises(ModelFileError, match=r"damaged.gguf: its architecture 'zlama' is not one that llama.cpp"):
        open_model(damaged)
    damaged.write_bytes(whole.replace(b"blk.1.ffn_norm", b"blk.1.ffn_nurm"))
    with pytest.raises(EngineError, match=r"damaged.gguf: .*'blk.1.ffn_norm.weight' not found. If the file is whole"):
        open_model(damaged)


def test_nothing_of_llama_cpps_log_reaches_the_screen(capfd):
    options = {"context_length": 64, "threads": 1, "flash_attention": None}
    with open_model() as model, LlamaContext(model, **options) as context:
        context.decode([1])
    assert capfd.readouterr() == ("", "")


def test_open_and_close_again_and_again_leaks_nothing():
    process = psutil.Process()

    def held():
        maps = len(process.memory_maps(grouped=False))
        return process.memory_info().rss, process.num_threads(), process.num_fds(), maps

    def cycle():
        options = {"context_length": 256, "threads": 1, "flash_attention": True}
        with open_model() as model, LlamaContext(model, **options) as context:
            context.decode([1, 2, 3])
            sampler = Sampler(0.8, 0.9, 1, model)
            sampler.sample(context)
            sampler.close()

    for _ in range(5):
        cycle()
    gc.collect()
    before = held()
    for _ in range(30):
        cycle()
    gc.collect()
    after = held()
    assert after[0] - before[0] < 4 << 20
    assert after[1:3] == before[1:3]
    assert after[3] <= before[3] + 4
