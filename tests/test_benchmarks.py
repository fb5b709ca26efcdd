"""The pieces of `make bench`: the bound, the limit, the processes under test, the table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tiny import tiny_model

from benchmarks import cgroup, run
from benchmarks.bound import Bound, first_token_limit
from benchmarks.child import expert_numbers
from benchmarks.disk import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    ExpertMeter,
    disk_bandwidth,
    expert_reads,
)
from benchmarks.experts import cache_bound
from benchmarks.measure import ChildError, Measurements, Noise, Settings
from benchmarks.report import report
from edgeinfer.modelfile import read_model_file
from edgeinfer.system import streaming_support

ROOT = Path(__file__).parents[1]
MB = 1_000_000
TAKE = (
    "import sys; data = bytearray(int(sys.argv[1])); data[::4096] = b'x' * len(data[::4096]); print('held')"
)

needs_streaming = pytest.mark.skipif(not streaming_support(), reason="streaming is off on this system")


def _why_no_cgroup():
    try:
        cgroup.check_writable()
    except cgroup.CgroupError as error:
        return str(error)
    return None


_NO_CGROUP = _why_no_cgroup()
needs_cgroup = pytest.mark.skipif(_NO_CGROUP is not None, reason=f"no memory cgroup: {_NO_CGROUP}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models"), "llama", "Q4_0")


def test_the_bound_where_the_disk_is_slower():
    # 3000 MB of weights, 1000 + 100 MB of budget: 2000 MB from a disk of 1000 MB/s take 2 s, computing 0.4 s
    bound = Bound(3000 * MB, 1100 * MB, 100 * MB, compute_seconds=0.4, disk_bytes_per_second=1000 * MB)
    assert bound.streamed_bytes == 2000 * MB
    assert bound.tokens_per_second == pytest.approx(0.5)
    assert bound.share(0.45) == pytest.approx(0.9)


def test_the_bound_where_computing_is_slower():
    # 100 MB take 0.1 s
    bound = Bound(1000 * MB, 1000 * MB, 100 * MB, compute_seconds=0.25, disk_bytes_per_second=1000 * MB)
    assert bound.tokens_per_second == pytest.approx(4)


def test_the_bound_where_everything_fits_and_where_not_even_the_overhead_does():
    assert Bound(100, 5000, 100, 0.5, 1.0).streamed_bytes == 0
    assert Bound(100, 5000, 100, 0.5, 1.0).tokens_per_second == pytest.approx(2)
    assert Bound(100, 50, 80, 0.5, 1.0).streamed_bytes == 100


def test_the_first_token_may_take_one_pass_and_half_a_second():
    assert first_token_limit(3000 * MB, 2000 * MB) == pytest.approx(2.0)


@needs_cgroup
def test_a_child_is_killed_above_the_limit_and_lives_below_it():
    def take(nbytes):
        return cgroup.run_command([sys.executable, "-c", TAKE, str(nbytes)], 100 << 20, timeout=60)

    above, kills = take(200 << 20)
    assert above.returncode == -9 and "held" not in above.stdout
    assert kills == 1
    below, kills = take(40 << 20)
    assert below.returncode == 0 and below.stdout == "held\n"
    assert kills == 0


@needs_cgroup
def test_a_cgroup_is_removed_with_what_still_runs_in_it():
    with cgroup.MemoryCgroup(64 << 20) as group:
        done = group.run(
            ["/bin/sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True
        )
        assert done.stdout.strip() in (group.path / "cgroup.procs").read_text().split()
    assert not group.path.exists()


@needs_cgroup
def test_the_limit_does_not_reach_the_parent():
    with cgroup.MemoryCgroup(64 << 20) as group:
        inside = group.run(["cat", "/proc/self/cgroup"], capture_output=True, text=True).stdout
        assert group.path.name in inside
    assert group.path.name not in Path("/proc/self/cgroup").read_text()


def test_without_a_writable_cgroup_it_says_so_and_stops(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cgroup, "_parents", lambda: iter([(2, tmp_path / "absent")]))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(["--model", "unused.gguf"]) == 1
    message = capsys.readouterr().err
    assert "no memory cgroup can be made here" in message and "No such file" in message
    assert "Run it as root" in message


def _child(*arguments):
    command = [sys.executable, "-m", "benchmarks.child", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_children_give_numbers_and_the_same_tokens(model):
    runs = [_child(engine, model, "--tokens", 6, "--ctx", 256) for engine in ("edgeinfer", "stock", "plain")]
    assert len(runs[0]["tokens"]) == 7
    for result in runs:
        assert result["tokens"] == runs[1]["tokens"]
        assert result["prompt_tokens"] == runs[1]["prompt_tokens"]
        assert result["tokens_per_second"] > 0
        assert 0 < result["load_seconds"] < result["first_token_seconds"]
        assert 10 << 20 < result["peak_memory_bytes"] < 1 << 30
        assert result["major_faults_per_token"] >= 0
    ours, file = runs[0], read_model_file(model)
    assert ours["mode"] == "in-memory"
    assert ours["pass_weight_bytes"] == file.weights_bytes
    assert ours["streamed_bytes_per_token"] == 0


def test_the_children_measure_prefill(model):
    for engine in ("edgeinfer", "plain"):
        result = _child(engine, model, "--prefill", 200, "--ctx", 256)
        assert result["prefill_tokens"] == 200 and result["prefill_tokens_per_second"] > 0
        assert result["prefill_streamed_bytes"] == 0


def test_a_child_that_fails_says_how(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(Exception, match="broken.gguf"):
        Measurements(tmp_path / "broken.gguf", Settings(threads=1))
    model = tiny_model(tmp_path, "llama", "F16")
    measurements = Measurements(model, Settings(threads=1))
    model.write_bytes(b"GGUF")
    with pytest.raises(ChildError, match="edgeinfer ended with exit code 1: .*ModelFileError"):
        measurements.child("edgeinfer")


def test_the_work_of_others_is_told_from_that_of_the_child():
    burn = [sys.executable, "-c", "import time\nwhile time.process_time() < 1.5: pass"]
    noise = Noise()
    subprocess.run(burn)
    quiet = noise.others()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        noise = Noise()
        subprocess.run(burn)
        assert 0 <= quiet < 1
        assert noise.others() > 0.2 / psutil.cpu_count()
    finally:
        other.kill()
        other.wait()


@needs_streaming
def test_the_disk_is_measured_only_with_enough_to_read(tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"x" * BLOCK_BYTES)
    with pytest.raises(ValueError, match="expected a file of 50,331,648 bytes or more"):
        disk_bandwidth(small)
    large = tmp_path / "large"
    large.write_bytes(b"x" * (3 * BLOCK_BYTES))
    assert 1e6 < disk_bandwidth(large) < 1e11


def _results(bound_share):
    """What a run gathers, in round numbers."""
    ours = {
        "tokens_per_second": 1.0, "bandwidth_before": 2e9, "bandwidth_after": 2e9, "read_alone_bytes_per_second": 2e9, "fresh_memory_seconds_per_gb": 0.3, "first_token_seconds": 1.9,
        "first_token_limit_seconds": 2.0, "major_faults_per_token": 12.0, "oom_kills": 0, "bound": 1.05,
        "bound_share": bound_share, "bound_all_weights": 1.0, "bound_share_all_weights": 1.0,
        "bound_streamed_bytes": 19e8, "streamed_bytes_per_token": 19e8, "pass_weight_bytes": 3e9,
        "overhead_bytes": 1e8, "disk_wait_fraction": 0.5, "import_seconds": 0.5,
    }  # fmt: skip
    number = {"edgeinfer": ours, "stock": {"tokens_per_second": 0.5}, "same_tokens": True}
    limits = [{"limit_share": 0.45, "limit_bytes": 1_350_000_000, "rounds": [number]}]
    return {
        "machine": {
            "processor": "a processor", "processors": 2, "memory_bytes": 16e9, "kernel": "6.0",
            "llama_cpp": "0.3", "load_average": "0.00 0.00 0.00",
        },
        "settings": {"threads": 2},
        "others_cpu": 0.03,
        "model": {"name": "m.gguf", "weights_bytes": 3e9},
        "streaming": {"limits": limits, "compute_seconds": 0.4, "stock_defaults": "was killed"},
    }  # fmt: skip


def test_the_table_tells_what_was_met():
    rows = {row.split(" | ")[0].lstrip("| "): row for row in report(_results(0.95)).splitlines()}
    assert rows["45% (1.35 GB): ratio to stock"].endswith("| 2.00 | >= 1.9: yes |")
    assert rows["45% (1.35 GB): bound, edgeinfer's share of it"].endswith("| 1.05, 0.950 | >= 0.9: yes |")
    assert rows["45% (1.35 GB): major page faults a token"].endswith("| 12.0 | < 10: NO |")
    assert "Other processes used up to 3% of the processors during a run." in rows
    assert rows["45% (1.35 GB): processes killed"].endswith("| 0 | 0: yes |")


def test_a_speed_above_the_bound_is_no_success():
    assert "1.300 | above the bound: disturbed, measure again |" in report(_results(1.3))
    assert "0.800 | >= 0.9: NO |" in report(_results(0.8))


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory):
    return tiny_model(
        tmp_path_factory.mktemp("experts"), "mixtral", "Q8_0", layers=6, ffn=1024, alignment=4096
    )


def test_the_bound_of_a_cache_of_experts():
    assert cache_bound(0.1, 400 * MB, 2000 * MB) == pytest.approx(5)  # the disk takes 0.2 s
    assert cache_bound(0.1, 100 * MB, 2000 * MB) == pytest.approx(10)  # computing takes longer


def test_shares_out_of_the_counters_of_the_cache():
    names = ("wanted", "hits", "guess_hits", "guesses", "guesses_used", "predicted", "predicted_right")
    before = dict.fromkeys(names, 10)
    after = {name: 10 + more for name, more in zip(names, (400, 300, 40, 80, 60, 380, 285))}
    numbers = expert_numbers(before, after, num_layers=20)
    assert numbers["hit_rate"] == 0.75 and numbers["on_the_way"] == 0.1
    assert numbers["recall"] == 0.75  # 285 of the 380 experts that are not in the first layer
    assert numbers["precision"] == 0.75 and numbers["reads_ahead_used"] == 0.75
    nothing = expert_numbers(after, after, num_layers=20)
    assert nothing["hit_rate"] is None and nothing["recall"] is None


def test_the_meter_reads_the_experts_and_nothing_else(expert_model):
    file = read_model_file(expert_model)
    reads = list(expert_reads(file))
    experts = [tensor for tensor in file.tensors if tensor.num_experts]
    assert len(experts) == 18
    for tensor in experts:
        inside = sum(size for _, start, size in reads if tensor.offset <= start < tensor.offset + tensor.nbytes)
        assert tensor.nbytes <= inside < tensor.nbytes + 2 * 4096 * tensor.num_experts
    assert all(size <= CHUNK_BYTES and size % 4096 == start % 4096 == 0 for _, start, size in reads)


@needs_streaming
def test_the_meter_measures_the_disk(expert_model, model):
    meter = ExpertMeter(read_model_file(expert_model), threads=2)
    try:
        assert 1e6 < meter.read(4 * MB) < 1e11
    finally:
        meter.close()
    with pytest.raises(ValueError, match="expected a mixture of experts, found none"):
        ExpertMeter(read_model_file(model))


@needs_streaming
def test_the_child_runs_another_cache_of_experts(expert_model):
    command = [sys.executable, "-m", "benchmarks.child", "edgeinfer", str(expert_model), "--memory", "1000000"]
    refused = subprocess.run([*command, "--ctx", "256"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    budget = int(re.findall(r"\((\d+) bytes\)", refused.stderr)[-1]) + (3 << 20)
    options = ("--tokens", 6, "--warmup", 2, "--ctx", 256)
    stock = _child("stock", expert_model, *options)
    default = _child("edgeinfer", expert_model, "--memory", budget, *options)
    lru = _child("edgeinfer", expert_model, "--memory", budget, "--policy", "lru", "--no-predict", *options)
    assert default["tokens"] == lru["tokens"] == stock["tokens"] and len(stock["tokens"]) == 9
    assert default["expert_cache"]["predict"] and not lru["expert_cache"]["predict"]
    assert lru["expert_cache"]["policy"] == "lru"
    assert lru["expert_cache"]["slots"] < lru["expert_cache"]["experts"] == 48
    for run in (default, lru):
        assert run["experts_wanted"] == 6 * 6 * 2  # tokens, layers, experts used
        assert run["read_alone_bytes_per_second"] > 0
    assert lru["recall"] == 0 and lru["precision"] is None
    assert default["recall"] > 0


def _expert_results(tokens_per_second):
    """What measuring a mixture of experts gives, in round numbers: the bound is 10 tokens/s."""
    run = {
        "tokens_per_second": tokens_per_second, "bound": 10.0, "bound_share": tokens_per_second / 10,
        "recall": 0.85, "precision": 0.85, "reads_ahead_used": 0.8, "hit_rate": 0.9, "on_the_way": 0.05,
        "expert_cache": {"policy": "lru", "predict": True, "slots": 700, "experts": 1536},
        "streamed_bytes_per_token": 2e8, "disk_wait_fraction": 0.1, "read_alone_bytes_per_second": 2e9,
        "peak_memory_bytes": 2.1e9, "oom_kills": 0,
    }  # fmt: skip
    prefill = {**run, "prefill_tokens": 512, "prefill_tokens_per_second": 20.0, "prefill_streamed_bytes": 4e9}
    model = {
        "name": "m.gguf", "weights_bytes": 4e9, "limit_share": 0.52, "limit_bytes": 2_080_000_000,
        "compute_seconds": 0.1, "lru": run, "nearly_all": {"limit_share": 0.9, "rounds": [{"on": run}]},
        "rounds": [{"on": run, "off": run, "stock": {"tokens_per_second": 0.3}, "same_tokens": True}],
        "prefill": {**prefill, "budget_bytes": 2_080_000_000},
    }  # fmt: skip
    results = _results(0.95)
    del results["model"], results["streaming"]
    return {**results, "experts": {"predictable": model}}


def test_the_table_of_experts_tells_what_was_met():
    rows = {row.split(" | ")[0].lstrip("| "): row for row in report(_expert_results(8.0)).splitlines()}
    assert rows["predictable 52%: ratio to stock"].endswith("| 26.7 | >= 22: yes |")
    # predictable routing has the higher goal; without prediction the lower one holds
    assert rows["predictable 52%: bound, share of it, prediction on"].endswith("| 10.00, 0.800 | >= 0.9: NO |")
    assert rows["predictable 52%: bound, share of it, prediction off"].endswith("| >= 0.75: yes |")
    assert rows["predictable 90%: edgeinfer / all in memory, the same kernels"].endswith("(0.800) | >= 0.9: NO |")
    assert rows["predictable 52%: memory (VmHWM), that prefill"].endswith("| within: NO |")
    assert "above the bound" in report(_expert_results(12.0))


def test_experts_alone_need_no_dense_model(monkeypatch, tmp_path):
    measured = []

    def measure(path, settings, compare):
        measured.append((path, compare))
        return {"noise": 0.5}

    monkeypatch.setattr(run, "measure_experts", measure)
    monkeypatch.setattr(run, "make_once", lambda name, work: work / name)
    args = run.argparse.Namespace(model=None, moe_model=None, work=tmp_path)
    results = {}
    assert run.measure_parts(["experts"], args, Settings(threads=1), results)
    assert [(path.name, compare) for path, compare in measured] == [
        ("predictable", True),
        ("unpredictable", False),
        ("small", False),
    ]
    assert results["others_cpu"] == 0.5 and "model" not in results
