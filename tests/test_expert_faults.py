"""Faults while experts are read: one error, the sequence as it was; the smallest budgets and caches; nothing leaks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streaming import build_shim, shim_environment, some_tokens, stock_logits
from test_expert_cache import cached_logits, expert_engine
from tiny import tiny_model

from benchmarks.cgroup import CgroupError, MemoryCgroup
from benchmarks.maker import make_model
from edgeinfer.engines.opening import Prepared
from edgeinfer.errors import BudgetError, ReadError
from edgeinfer.modelfile import read_model_file

MIB = 1 << 20
PROMPT = some_tokens(20)
BATCHES = [PROMPT, *([token] for token in some_tokens(25))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


# ---- the disk and the file -------------------------------------------------------------------------------

READ_THROUGH_SHIM = """
import json, sys
import numpy as np
from test_expert_cache import expert_engine
from edgeinfer.errors import EdgeInferError

path, out, batches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
logits, computed, errors, positions = [], [], [], []
with expert_engine(path, 4) as engine:
    decode = engine.context.decode

    def keep(tokens, outputs):
        decode(tokens, outputs)
        last.extend(engine.context.logits(i).copy() for i in range(len(tokens)))
        last_batches.append(tokens)

    engine.context.decode = keep
    for batch in batches:
        last, last_batches = [], []
        try:
            engine.prefill(batch)
            logits += last
            computed += last_batches
        except EdgeInferError as error:
            errors.append(f"{type(error).__name__}: {error}")
        positions.append(engine.position)
np.save(out, np.stack(logits) if logits else np.empty((0, 0), np.float32))
print(json.dumps({"errors": errors, "positions": positions, "tokens": len(logits), "batches": computed}))
"""


def read_through(shim, path, out, **settings):
    command = [sys.executable, "-c", READ_THROUGH_SHIM, path, out, json.dumps(BATCHES)]
    done = subprocess.run(
        command, env=shim_environment(shim, **settings), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout)


# The prompt reads nearly all experts several times over, in batches that a cache of four allows.
@pytest.mark.parametrize("good_reads", [5, 100, 900, 6000])
def test_disk_that_fails_while_experts_are_read(models, shim, tmp_path, good_reads):
    path = tiny_model(models, "olmoe", "Q4_0")
    logits, told = read_through(shim, path, tmp_path / "logits.npy", FAIL_AFTER=good_reads)
    assert told["errors"] and len(set(told["errors"])) == 1  # it stays refused, with the same words
    assert re.match(r"ReadError: .*\(error 5\): " + re.escape(str(path)), told["errors"][0])
    assert "Check the disk" in told["errors"][0] and "\n" not in told["errors"][0]
    assert told["positions"][-1] == told["tokens"] == len(logits) < sum(map(len, BATCHES))
    assert told["tokens"] > 0 or good_reads < 6000
    if len(logits):
        assert np.array_equal(logits, stock_logits(path, told["batches"])[: len(logits)])


@pytest.mark.parametrize("settings", [{"SHORT_READS": 1}, {"REFUSE_DIRECT": 1}], ids=str)
def test_disk_that_reads_oddly(models, shim, tmp_path, settings):
    path = tiny_model(models, "olmoe", "Q4_0")
    logits, told = read_through(shim, path, tmp_path / "logits.npy", **settings)
    assert not told["errors"]
    assert np.array_equal(logits, stock_logits(path, told["batches"]))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(1000))


@pytest.mark.parametrize("fault", [truncate, overwrite, Path.unlink], ids=lambda fault: fault.__name__)
def test_file_that_changes_between_tokens(models, tmp_path, fault):
    path = Path(shutil.copy(tiny_model(models, "mixtral", "Q4_0"), tmp_path / "model.gguf"))
    with expert_engine(path, 3) as engine:
        engine.prefill(PROMPT)
        fault(path)
        messages = set()
        for _ in range(3):
            with pytest.raises(ReadError) as refused:
                engine.decode([7])
            assert engine.position == len(PROMPT)
            messages.add(str(refused.value))
    assert len(messages) == 1 and str(path) in messages.pop()


# ---- Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 9])
def test_decoding_goes_on_after_interrupts_at_any_time(models, slots):
    path = tiny_model(models, "qwen3moe", "Q4_K", layers=4)
    batches = [[token] for token in some_tokens(60)]
    expected = stock_logits(path, batches)
    interrupts, found = 0, []
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with expert_engine(path, slots) as engine:
            for number, batch in enumerate(batches):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 * (number % 20 + 1))
                    engine.prefill(batch)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    interrupts += 1
                    assert engine.position == number
                    engine.prefill(batch)
                found.append(engine.context.logits().copy())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts >= 5
    assert np.array_equal(np.stack(found), expected)


# ---- small caches, odd files -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mixtral", "gpt-oss", "deepseek2", "grovemoe"])
def test_cache_of_the_experts_of_one_token(models, arch):
    path = tiny_model(models, arch, "Q4_0", layers=4)
    batches = [[token] for token in some_tokens(30)]
    with expert_engine(path, 2) as engine:
        assert np.array_equal(cached_logits(engine, batches), stock_logits(path, batches))
        counted = engine.expert_statistics()
    assert counted["hits"] + counted["guess_hits"] < counted["wanted"]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_experts_that_share_pages(models, type, direct):
    """An expert's matrix of a few kilobytes, at any multiple of 32 bytes."""
    path = tiny_model(models, "olmoe", type, ffn=96 if type == "Q8_0" else 160, experts=16, layers=4)
    info = next(t for t in read_model_file(path).tensors if t.role == "ffn_up_exps")
    assert (info.nbytes // 16) % 4096 and info.offset % 4096
    with expert_engine(path, 13, direct=direct, chunk_bytes=8192) as engine:
        batches = [some_tokens(3), *([token] for token in some_tokens(30))]
        assert np.array_equal(cached_logits(engine, batches), stock_logits(path, batches))


def test_loading_and_closing_leaves_nothing_behind(models):
    path = tiny_model(models, "mixtral", "Q8_0")

    def once():
        with expert_engine(path, 9) as engine:
            engine.prefill(PROMPT[:5])
            return len(os.listdir("/proc/self/task"))

    def held():
        statm = Path("/proc/self/statm").read_text().split()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), int(statm[1]) * 4096

    for _ in range(3):
        threads_inside = once()
    files, threads, resident = held()
    assert threads_inside > threads
    for _ in range(12):
        once()
    files_after, threads_after, resident_after = held()
    assert (files_after, threads_after) == (files, threads)
    assert resident_after - resident < 8 * MIB  # a pool is 5 MB


# ---- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "deepseek2", "gpt-oss", "grovemoe"])
def test_smallest_budget_of_a_tiny_model_can_be_planned(models, arch):
    """Where a model is so small, what a token uses is all that the cache holds."""
    file = read_model_file(tiny_model(models, arch, "Q8_0", layers=4))
    prepared = Prepared(file, context_length=256, threads=1, ubatch=64)
    try:
        smallest = prepared.smallest_budget()
        plan = prepared._make_plan(smallest)
        assert plan.pools is None or min(plan.pools.slots) >= min(2, file.num_experts)
        assert plan.ledger.total <= smallest
        with pytest.raises(BudgetError) as refused:
            prepared._make_plan(smallest - 2 * MIB)
        assert refused.value.smallest_bytes <= smallest
        for more in range(0, 24 * MIB, MIB // 2):  # no larger one is refused
            plan = prepared._make_plan(smallest + more)
            assert plan.ledger.total <= smallest + more
    finally:
        prepared.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "moe.gguf"
    make_model(path, "olmoe", "Q4_0", size=300_000_000, vocabulary=8000, context=2048)
    yield path
    path.unlink()


RUN_LARGE = """
import json, sys
from edgeinfer.engines.opening import open_engine

engine = open_engine(sys.argv[1], memory=int(sys.argv[2]), context_length=1024, threads=2)
engine.prefill([1 + i * 7919 % 7999 for i in range(int(sys.argv[3]))])
tokens = []
for _ in range(6):
    tokens.append(int(engine.context.logits().argmax()))
    engine.decode(tokens[-1:])
slots = engine.plan.pools.slots if engine.plan.pools else None
print(json.dumps({"peak": engine.statistics().peak_memory_bytes, "slots": slots, "position": engine.position}))
engine.close()
"""


def smallest_of(path):
    program = "import sys; from edgeinfer.engines.opening import _smallest_budget; "
    program += "from edgeinfer.modelfile import read_model_file; "
    program += "print(_smallest_budget(read_model_file(sys.argv[1]), 1024, 2))"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# The smallest cache computes token by token, and would take minutes for as many.
@pytest.mark.parametrize("more, tokens", [(3 * MIB, 24), (100 * MIB, 512)])
def test_budget_is_held_in_a_cgroup_of_its_size(large, more, tokens):
    budget = smallest_of(large) + more  # Python's own memory differs by up to 3 MiB from run to run
    try:
        cgroup = MemoryCgroup(budget)
    except CgroupError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    with cgroup:
        done = cgroup.run(
            [sys.executable, "-c", RUN_LARGE, str(large), str(budget), str(tokens)], capture_output=True, timeout=100
        )
        assert cgroup.oom_kills == 0
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["position"] == tokens + 6 and told["slots"]
    assert told["peak"] <= budget, (told, budget)


def test_budget_below_one_layers_active_experts_names_one_that_works(large):
    smallest = smallest_of(large)
    command = [sys.executable, "-m", "edgeinfer", "run", str(large), "--ctx", "1024", "--threads", "2"]
    done = subprocess.run(
        [*command, "-p", "x", "-n", "1", "--memory", str(smallest - 6 * MIB)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    named = int(re.search(r"the smallest that works is .* \((\d+) bytes\)", done.stderr)[1])
    assert abs(named - smallest) < 4 * MIB
