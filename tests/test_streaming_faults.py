"""Faults while a model is streamed: one error, never a wrong token, never a hang; Ctrl-C at any time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from streaming import (
    build_shim,
    make_plan,
    shim_environment,
    some_tokens,
    stock_context,
    stock_greedy,
    stock_logits,
    streamed_logits,
    streaming_engine,
)
from tiny import tiny_model

import edgeinfer.engines.gguf
from benchmarks.maker import make_model
from edgeinfer.engines.opening import Prepared
from edgeinfer.errors import EdgeInferError, ReadError
from edgeinfer.modelfile import read_model_file

PROMPT = some_tokens(20)
PROMPT_TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def model(models, tmp_path):
    """A file of one's own, to be damaged."""
    return Path(shutil.copy(tiny_model(models, "llama", "Q4_K"), tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def answer(models):
    """Stock llama.cpp's greedy continuation of PROMPT by the undamaged model."""
    return stock_greedy(tiny_model(models, "llama", "Q4_K"), PROMPT, 200)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(path.stat().st_size // 3))


def append(path):
    with open(path, "ab") as file:
        file.write(b"more")


def replace(path):
    other = path.with_suffix(".new")
    other.write_bytes(os.urandom(path.stat().st_size))
    os.replace(other, path)


def delete(path):
    path.unlink()


FAULTS = [truncate, overwrite, append, replace, delete]


def greedy(engine, count, tokens):
    """Append `count` greedy tokens to `tokens`, which keeps those that came before an error."""
    engine.prefill(PROMPT)
    while True:
        tokens.append(int(engine.context.logits().argmax()))
        if len(tokens) == count:
            return
        engine.decode(tokens[-1:])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_file_that_changes_between_tokens(model, answer, fault):
    tokens = []
    with streaming_engine(model, outputs="last") as engine:
        greedy(engine, 30, tokens)
        position = engine.position
        fault(model)
        messages = []
        for _ in range(3):  # it stays refused
            with pytest.raises(ReadError) as refused:
                engine.decode(tokens[-1:])
            assert engine.position == position
            messages.append(str(refused.value))
    assert tokens == answer[:30]
    assert len(set(messages)) == 1 and str(model) in messages[0]
    assert messages[0].startswith("The model file could not be used any more: ")
    assert "load the model again" in messages[0] and "\n" not in messages[0]


@pytest.mark.parametrize("fault", [truncate, overwrite, replace], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("delay", [0.0, 0.004, 0.03])
def test_file_that_changes_in_the_middle_of_a_token(models, model, answer, fault, delay):
    tokens = []
    with streaming_engine(model, outputs="last") as engine:
        greedy(engine, 2, tokens)
        engine.truncate(0)
        tokens.clear()
        vandal = threading.Timer(delay, fault, [model])
        vandal.start()
        with pytest.raises(ReadError):
            while True:
                greedy(engine, 200, tokens)
                engine.truncate(0)
                assert tokens == answer
                tokens.clear()
        vandal.join()
    assert tokens == answer[: len(tokens)]


def test_file_that_is_replaced_while_it_is_loaded(models, model):
    """Same size, same layout, other weights: only the file's identity tells."""
    other = tiny_model(models, "llama", "Q4_K", seed=1)
    assert other.stat().st_size == model.stat().st_size
    prepared = Prepared(read_model_file(model), context_length=256, threads=1)
    shutil.copy(other, model.with_suffix(".new"))
    os.replace(model.with_suffix(".new"), model)
    try:
        with pytest.raises(EdgeInferError, match="changed.*while it was loaded"):
            prepared.start(make_plan("everything", prepared.uses))
    finally:
        prepared.close()


# ---- the disk ------------------------------------------------------------------------------------------


def run_with_shim(shim, path, out, batches, **settings):
    """(logits of the batches that were computed, error or None), from a process of its own."""
    options = json.dumps({"kind": "everything", "batches": batches})
    script = Path(__file__).with_name("run_streamed.py")
    result = subprocess.run(
        [sys.executable, script, path, out, options],
        env=shim_environment(shim, **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return np.load(out), json.loads(result.stdout)


# One pass of this model reads about 300 chunks, and reading runs ahead into the next one.
@pytest.mark.parametrize("good_reads", [3, 150, 500, 1111])
def test_disk_that_fails_in_the_middle_of_a_token(models, shim, tmp_path, good_reads):
    path = tiny_model(models, "llama", "Q4_K")
    batches = [PROMPT] + [[token] for token in some_tokens(10)]
    logits, told = run_with_shim(shim, path, tmp_path / "logits.npy", batches, FAIL_AFTER=good_reads)
    assert re.match(r"ReadError: .*\(error 5\): " + re.escape(str(path)), told["error"])
    assert "Check the disk" in told["error"]
    assert told["statistics"]["passes"] < len(batches)
    if good_reads > 1000:
        assert len(logits) > len(PROMPT)
    if len(logits):
        assert np.array_equal(logits, stock_logits(path, batches)[: len(logits)])


# ---- Ctrl-C --------------------------------------------------------------------------------------------


def interrupting(after_calls):
    """A progress callback that is Ctrl-C at its n-th call in the middle of a pass."""
    calls = 0

    def progress(_done, _total, fraction):
        nonlocal calls
        calls += 0 < fraction < 1
        if calls == after_calls:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize("kind", ["everything", "alternating", "largest"])
def test_interrupted_pass_leaves_the_sequence_as_it_was(models, monkeypatch, kind):
    monkeypatch.setattr(edgeinfer.engines.gguf, "POLL_SECONDS", 0.0005)
    path = tiny_model(models, "qwen3", "Q8_0")
    first, long, last = some_tokens(30), some_tokens(200), [[5], [9, 8, 7]]
    expected = stock_logits(path, [first, long[:64], long[64:128], long[128:192], long[192:], *last])
    with streaming_engine(path, kind) as engine:
        found = streamed_logits(engine, [first])
        for after_calls in (1, 2, 5):  # in the first batch, or in a later one
            with pytest.raises(KeyboardInterrupt):
                engine.prefill(long, interrupting(after_calls))
            assert engine.position == len(first)
        rest = [long[start : start + 64] for start in range(0, len(long), 64)]
        found = np.concatenate([found, streamed_logits(engine, [*rest, *last])])
        assert engine.position == len(found)
    assert np.array_equal(found, expected)


def test_decoding_goes_on_after_interrupts_at_any_time(models, monkeypatch):
    path = tiny_model(models, "llama", "Q4_K")
    batches = [PROMPT] + [[token] for token in some_tokens(40)]
    expected = stock_logits(path, batches)
    interrupts = 0
    found = []
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with streaming_engine(path) as engine:
            for number, batch in enumerate(batches):
                before, done = engine.position, False
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0003 * (number % 20 + 1))
                    engine.prefill(batch)
                    done = True
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if not done:  # the alarm may also come between the pass and the next line
                        interrupts += 1
                        if engine.position == before + len(batch):
                            engine.truncate(before)  # it came when prefill was about to return
                        assert engine.position == before
                        engine.prefill(batch)
                found += [engine.context.logits(i).copy() for i in range(len(batch))]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts >= 5
    assert np.array_equal(np.stack(found), expected)


def test_second_ctrl_c_while_the_first_one_stops_the_pass(models, monkeypatch):
    monkeypatch.setattr(edgeinfer.engines.gguf, "POLL_SECONDS", 0.0005)
    path = tiny_model(models, "llama", "Q4_K")
    long = some_tokens(64)
    with streaming_engine(path) as engine:
        interrupt, again = engine._interrupt, [True]

        def with_a_second_one(on):
            interrupt(on)
            if on and again:
                again.clear()
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(engine, "_interrupt", with_a_second_one)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(long, interrupting(1))
        assert not again and engine.position == 0
        assert np.array_equal(streamed_logits(engine, [long]), stock_logits(path, [long]))


STOP_WHILE_WAITING = """
import signal, sys, time
from streaming import streaming_engine

raised_at = None

def ctrl_c(*_):
    global raised_at
    raised_at = time.monotonic()
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, ctrl_c)
with streaming_engine(sys.argv[1], reading_threads=1) as engine:
    for attempt in range(2):
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        try:
            engine.prefill([1, 2, 3])
        except KeyboardInterrupt:
            print(time.monotonic() - raised_at)
        assert engine.position == 0
"""


def test_ctrl_c_while_waiting_for_a_slow_disk(models, shim):
    """Every read takes 0.2 s, so that a pass would take a minute."""
    path = tiny_model(models, "llama", "Q4_K")
    environment = shim_environment(shim, DELAY_MS=200)
    command = [sys.executable, "-c", STOP_WHILE_WAITING, path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seconds = [float(line) for line in result.stdout.split()]
    assert len(seconds) == 2 and max(seconds) < 2.0


# ---- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that does not fit the smallest budgets, and stock's greedy text for PROMPT_TEXT."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    make_model(path, "llama", "F16", size=80_000_000, layers=8, vocabulary=4000, context=2048)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def large_text(large):
    with stock_context(large, context_length=512) as context:
        tokens = context.model.tokenize(PROMPT_TEXT, True, True)
    answer = stock_greedy(large, tokens, 60, context_length=512)
    with stock_context(large, context_length=512) as context:
        return b"".join(context.model.token_bytes(token) for token in answer).decode("utf-8", "ignore")


def run_command(path, memory):
    options = ["-p", PROMPT_TEXT, "-n", "400", "--temperature", "0", "--threads", "1", "--ctx", "512"]
    return [sys.executable, "-m", "edgeinfer", "run", str(path), "--memory", str(memory), *options]


@pytest.fixture(scope="module")
def tight(large):
    """A budget in which this model must be streamed."""
    refused = subprocess.run(run_command(large, "1MiB"), capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    return int(re.search(r"\((\d+) bytes\)", refused.stderr)[1]) + (4 << 20)


def assert_one_message(process, out, errors, text):
    assert process.returncode == 1
    assert "Traceback" not in errors
    messages = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(messages) == 1 and "The model file could not be used any more" in messages[0]
    assert out and text.startswith(out.decode("utf-8", "ignore").removesuffix("\n"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_command_ends_with_one_message_when_the_file_changes(large, large_text, tight, tmp_path, fault):
    path = Path(shutil.copy(large, tmp_path / "large.gguf"))
    process = subprocess.Popen(run_command(path, tight), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out = process.stdout.read(10)
        fault(path)
        rest, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)
    assert_one_message(process, out + rest, errors.decode(), large_text)


def test_command_ends_with_one_message_when_the_disk_fails(large, large_text, tight, shim):
    environment = shim_environment(shim, FAIL_AFTER=400)  # a pass takes about 100 reads
    command = run_command(large, tight)
    process = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert_one_message(process, process.stdout, process.stderr.decode(), large_text)
    assert b"(error 5)" in process.stderr
