"""ONNX decoders write through the same interface as GGUF models; the reference is transformers on the same
weights."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx_kit import command, error_of
from tiny_decoder import CONTEXT, TEXTS, tiny_llama, write_decoder, write_tokenizer

import edgeinfer
from edgeinfer.budget import process_memory
from edgeinfer.engines.decoder import open_decoder
from edgeinfer.engines.onnx import OnnxModel
from edgeinfer.errors import BudgetError, EngineError, PromptError
from edgeinfer.system import streaming_support

needs_pager = pytest.mark.skipif(not streaming_support(), reason="weights cannot be streamed on this system")
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_llama(tokenizer.get_vocab_size())


@pytest.fixture(scope="module", params=[False, True], ids=["growing", "in place"])
def decoder(request, tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("decoder")
    write_tokenizer(folder)
    return write_decoder(folder, llama, request.param)


def greedy(llama, tokens, count):
    """transformers without a cache: every token computed from the whole text."""
    tokens = list(tokens)
    start = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[start:]


def logits_of(llama, tokens):
    with torch.no_grad():
        return llama(torch.tensor([list(tokens)])).logits[0, -1].numpy()


def test_greedy_tokens_equal_transformers(decoder, llama, tokenizer):
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    with edgeinfer.load(decoder, threads=1) as model:
        text = "".join(model.generate(PROMPT, max_tokens=40, temperature=0))
        stats = model.stats
    assert stats.tokens == greedy(llama, prompt, len(stats.tokens))
    assert (stats.prompt_tokens, stats.text) == (len(prompt), text) and len(stats.tokens) > 20
    assert text == tokenizer.decode(stats.tokens).replace("\ufffd", "")  # bytes that are no text are dropped
    assert stats.tokens_per_second > 1 and stats.mode == "in-memory"


@pytest.mark.parametrize("batch", [1, 3, 512])
def test_logits_do_not_depend_on_the_batches(decoder, llama, tokenizer, batch):
    tokens = tokenizer.encode(" ".join(TEXTS[:2]), add_special_tokens=False).ids
    engine = open_decoder(decoder, threads=1)
    engine.ubatch = batch
    engine.prefill(tokens)
    np.testing.assert_allclose(engine.logits, logits_of(llama, tokens), atol=2e-4)
    assert engine.position == len(tokens)
    engine.close()


def test_tokens_can_be_taken_back(decoder, llama):
    engine = open_decoder(decoder, threads=1)
    engine.prefill([5, 6, 7, 8, 9, 10])
    assert engine.truncate(3) == 3
    engine.decode([11])
    np.testing.assert_allclose(engine.logits, logits_of(llama, [5, 6, 7, 11]), atol=2e-4)
    assert engine.truncate(0) == 0
    engine.prefill([12, 13])
    np.testing.assert_allclose(engine.logits, logits_of(llama, [12, 13]), atol=2e-4)
    engine.close()


def test_the_cache_is_written_in_place(decoder):
    """The buffers stay where they are; where a cache grows, the present of a run is the past of the next."""
    engine = open_decoder(decoder, threads=1)
    addresses = []
    for token in range(5, 10):
        engine.decode([token])
        addresses.append([value.data_ptr() for value in engine._cache._values.values()])
    shapes = {tuple(value.shape()) for value in engine._cache._values.values()}
    if engine.in_place:
        assert all(found == addresses[0] for found in addresses) and shapes == {(1, 2, CONTEXT, 16)}
    else:
        assert shapes == {(1, 2, 5, 16)}
    engine.close()


def test_what_the_model_says_of_itself(decoder, tmp_path):
    """Without config.json, its metadata names the context and the end tokens."""
    model = onnx.load(decoder)
    for key, value in (("edgeinfer.context_length", "77"), ("edgeinfer.eos_token_id", "[1, 9]")):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, tmp_path / "m.onnx")
    (tmp_path / "tokenizer.json").write_bytes((decoder.parent / "tokenizer.json").read_bytes())
    engine = open_decoder(tmp_path / "m.onnx", threads=1)
    assert engine.context_length == 77 and engine.model.is_end(9) and not engine.model.is_end(8)
    engine.close()


def test_the_context_has_an_end(decoder, tokenizer):
    with edgeinfer.load(decoder, ctx=12, threads=1) as model:
        list(model.generate("Once", temperature=0))
        assert model.finish in ("context", "end") and model.engine.position <= 12
        with pytest.raises(PromptError, match="the context holds 12"):
            model.generate(PROMPT * 20)
        with pytest.raises(EngineError, match="context of 12 tokens is full"):
            model.engine.truncate(0)
            model.engine.prefill(list(range(5, 20)))
        assert model.engine.position == 0


def test_samples_are_repeatable_and_follow_the_distribution(decoder):
    with edgeinfer.load(decoder, threads=1) as model:
        one = "".join(model.generate(PROMPT, max_tokens=12, seed=7))
        assert one == "".join(model.generate(PROMPT, max_tokens=12, seed=7))
        assert len({"".join(model.generate(PROMPT, max_tokens=12, seed=seed)) for seed in range(5)}) > 1
        engine = model.engine
        engine.logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
        draws = [engine.make_sampler(1.0, 0.9, seed).sample(engine) for seed in range(600)]
    counts = np.bincount(draws, minlength=4) / 600
    np.testing.assert_allclose(counts, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.07)


def test_a_conversation_computes_only_what_is_new(decoder):
    with edgeinfer.load(decoder, threads=1) as model:
        first = [{"role": "user", "content": PROMPT}]
        answer = "".join(model.chat(first, max_tokens=4, temperature=0))
        position = model.engine.position
        list(model.chat([*first, {"role": "assistant", "content": answer}], max_tokens=2, temperature=0))
        assert model.engine.position >= position


def test_the_command_writes(decoder, llama, tokenizer):
    result = command("run", decoder, "-p", PROMPT, "-n", 10, "--temperature", 0, "--json", "--threads", 1)
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    assert found["tokens"] == greedy(llama, prompt, 10)
    assert 0 < found["peak_memory_bytes"] <= found["budget_bytes"]


def test_a_cache_that_does_not_fit_is_refused(decoder):
    with pytest.raises(BudgetError, match=r"KV cache of 4,000,000 tokens takes .* smaller --ctx"):
        open_decoder(decoder, context_length=4_000_000, memory="1GiB")


@needs_pager
def test_what_the_process_holds_already_is_named_beside_the_cache(decoder):
    held = process_memory().rss_bytes
    with pytest.raises(BudgetError, match=r"KV cache of 128 tokens takes .*, and the model .* at least") as error:
        open_decoder(decoder, context_length=128, memory=held // 2)
    assert error.value.smallest_bytes >= held


@pytest.fixture(scope="module")
def large(tokenizer):
    """75 MB."""
    return tiny_llama(tokenizer.get_vocab_size(), layers=12, feed_forward=8192)


@needs_pager
@pytest.mark.parametrize("in_place", [False, True], ids=["growing", "in place"])
def test_a_decoder_that_is_larger_than_its_budget_writes_the_same(large, in_place, tmp_path, monkeypatch):
    """In a process of its own, prepared and then from what was prepared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = write_tokenizer(tmp_path)
    path = write_decoder(tmp_path, large, in_place)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    options = ["-p", PROMPT, "-n", 12, "--temperature", 0, "--json", "--threads", 1, "--memory", "135MiB"]
    for _ in range(2):
        result = command("run", path, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
        found = json.loads(result.stdout)
        assert found["mode"] == "streaming" and found["streamed_bytes_per_token"] > 20e6
        assert found["tokens"] == greedy(large, prompt, len(found["tokens"]))
        assert found["peak_memory_bytes"] <= found["budget_bytes"] == 135 << 20


def test_without_a_tokenizer_it_is_a_model_of_arrays(decoder, tmp_path):
    path = tmp_path / "decoder.onnx"
    path.write_bytes(decoder.read_bytes())
    with edgeinfer.load(path) as model:
        assert isinstance(model, OnnxModel)
    message = error_of(command("run", path, "-p", "hello"))
    assert "expected" in message and "tokenizer.json" in message


def test_a_tokenizer_of_another_model_is_noticed(decoder, tmp_path):
    path = tmp_path / "decoder.onnx"
    path.write_bytes(decoder.read_bytes())
    larger = json.loads((decoder.parent / "tokenizer.json").read_text())
    larger["added_tokens"].append({**larger["added_tokens"][0], "id": 5000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(larger))
    with edgeinfer.load(path) as model, pytest.raises(PromptError, match=r"token \d+, but the model has \d+"):
        model.generate("<far>")
