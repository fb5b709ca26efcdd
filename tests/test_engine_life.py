"""Engines beside each other, engines that come and go, and real models whose text is stock llama.cpp's."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from streaming import (
    make_plan,
    some_tokens,
    stock_context,
    stock_greedy,
    stock_logits,
    streamed_logits,
    streaming_engine,
)
from tiny import tiny_model

from edgeinfer.engines.opening import Prepared, open_engine
from edgeinfer.errors import ReadError
from edgeinfer.modelfile import read_model_file

DATA = os.environ.get("EDGEINFER_TEST_DATA")
REAL_MODELS = ["lm/stories260K.gguf", "lm/stories260K-moe4x.gguf"]
BATCHES = [some_tokens(40), [7], some_tokens(64), [3], [4]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


# ---- two at once ---------------------------------------------------------------------------------------


def test_two_models_in_turn(models):
    first, second = tiny_model(models, "llama", "Q4_0"), tiny_model(models, "gemma", "Q6_K")
    found = [], []
    with streaming_engine(first) as one, streaming_engine(second, "alternating") as other:
        for batch in BATCHES:
            for engine, logits in zip((one, other), found):
                logits.append(streamed_logits(engine, [batch]))
        one.close()  # must leave the other as it is
        found[1].append(streamed_logits(other, [[9]]))
    assert np.array_equal(np.concatenate(found[0]), stock_logits(first, BATCHES))
    assert np.array_equal(np.concatenate(found[1]), stock_logits(second, [*BATCHES, [9]]))


def test_the_same_file_twice(models):
    path = tiny_model(models, "qwen3", "Q4_K")
    with streaming_engine(path) as one, streaming_engine(path, "largest") as other:
        both = [streamed_logits(engine, BATCHES) for engine in (one, other)]
    expected = stock_logits(path, BATCHES)
    assert all(np.array_equal(found, expected) for found in both)


def test_models_that_load_and_compute_at_the_same_time(models):
    work = [("llama", "Q4_K", "everything"), ("qwen2", "Q8_0", "alternating"), ("phi3", "F16", "largest")]
    paths = [tiny_model(models, arch, type) for arch, type, _ in work]
    expected = [stock_logits(path, BATCHES) for path in paths]
    together = threading.Barrier(len(work))

    def run(number):
        together.wait(30)
        for _ in range(4):
            with streaming_engine(paths[number], work[number][2]) as engine:
                found = streamed_logits(engine, BATCHES)
            assert np.array_equal(found, expected[number])
        return True

    with ThreadPoolExecutor(len(work)) as threads:
        assert all(threads.map(run, range(len(work)), timeout=120))


# ---- load, close, load again ---------------------------------------------------------------------------


def held():
    """What this process holds: threads, descriptors, mappings, and bytes of memory."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "bytes": int(status.split("VmRSS:")[1].split()[0]) * 1024,
        "address space": int(status.split("VmSize:")[1].split()[0]) * 1024,
    }


def life_streamed(path):
    with streaming_engine(path) as engine:
        engine.prefill(some_tokens(30))
        engine.decode([1])


def life_planned(path):
    engine = open_engine(path, memory="4GiB", context_length=256, threads=1)
    engine.prefill(some_tokens(30))
    engine.close()


def life_never_started(path):
    Prepared(read_model_file(path), context_length=256, threads=1).close()


def life_ended_in_the_middle_of_reading(path):
    prepared = Prepared(read_model_file(path), context_length=256, threads=1)
    prepared.start(make_plan("everything", prepared.uses)).close()


def life_interrupted(path):
    def ctrl_c(_done, _total, _fraction):
        raise KeyboardInterrupt

    with streaming_engine(path) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(some_tokens(64), ctrl_c)


def life_failed(path):
    with streaming_engine(path) as engine:
        engine.prefill(some_tokens(30))
        os.utime(path)
        with pytest.raises(ReadError):
            engine.decode([1])


LIVES = [
    life_streamed,
    life_planned,
    life_never_started,
    life_ended_in_the_middle_of_reading,
    life_interrupted,
    life_failed,
]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts what /proc/self lists")
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__.removeprefix("life_"))
def test_nothing_is_left_behind(tmp_path, life):
    path = tiny_model(tmp_path, "llama", "Q8_0")
    for _ in range(5):
        life(path)
    before = held()
    for _ in range(20):
        life(path)
    after = held()
    assert after["threads"] == before["threads"]
    assert after["descriptors"] == before["descriptors"]
    # The allocator's own mappings and free pages come and go: a model is 2 MB, so 20 leaked ones would show.
    assert after["mappings"] <= before["mappings"] + 5
    assert after["bytes"] < before["bytes"] + 3_000_000
    assert after["address space"] < before["address space"] + 20_000_000


# ---- real models ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
@pytest.mark.parametrize("name", REAL_MODELS)
def test_greedy_text_of_real_models_equals_stock(name):
    path = Path(DATA, name)
    with stock_context(path) as context:
        model = context.model
        prompt = model.tokenize("Once upon a time", True, True)
        expected = stock_greedy(path, prompt, 120)
        text = b"".join(map(model.token_bytes, expected)).decode()
    assert len(text) > 200 and " the " in text

    def greedy(engine):
        tokens = []
        engine.prefill(prompt)
        while len(tokens) < 120:
            tokens.append(int(engine.context.logits().argmax()))
            engine.decode(tokens[-1:])
        return tokens

    for kind in ("everything", "alternating", "largest"):
        with streaming_engine(path, kind, outputs="last") as engine:
            assert greedy(engine) == expected, kind
            assert engine._paged.statistics()["ring_wraps"] > 100
    for memory in ("1GiB", "90%", None):
        engine = open_engine(path, memory=memory, context_length=256, threads=1)
        assert greedy(engine) == expected, memory
        engine.close()
