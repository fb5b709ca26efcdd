"""The budget in a real memory cgroup of its size: 250 MB of weights, prepared, opened and run inside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_encoders import Encoder, encoder_file

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from benchmarks.cgroup import CgroupError, MemoryCgroup, drop_page_cache

ROOT = Path(__file__).parents[2]
BUDGET = 190_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = encoder_file(tmp_path_factory.mktemp("cgroup"), Encoder(layers=5, width=1024, ffn=4096))
    assert 240e6 < path.with_name(path.name + ".data").stat().st_size < 270e6
    yield path
    path.with_name(path.name + ".data").unlink()


def child(engine, model, batch):
    command = [sys.executable, "-m", "benchmarks.onnx_child", engine, str(model), "--batch", str(batch)]
    return [*command, "--passes", "3", *(["--memory", str(BUDGET)] if engine == "edgeinfer" else [])]


def test_peak_memory_is_at_most_the_budget(model, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, "env": environment}
    try:
        cgroup = MemoryCgroup(BUDGET)
    except CgroupError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    with cgroup:
        drop_page_cache([model.with_name(model.name + ".data")])
        for batch in (1, 8):
            result = cgroup.run(child("edgeinfer", model, batch), **options)
            assert result.returncode == 0, result.stderr
            told = json.loads(result.stdout)
            stock = json.loads(subprocess.run(child("stock", model, batch), **options).stdout)
            assert told["mode"] == "streaming" and told["digest"] == stock["digest"]
            assert told["peak_memory_bytes"] <= BUDGET
            assert told["streamed_bytes"] > 100e6 and told["major_faults_per_pass"] < 10
            assert told["resident_bytes"] + told["ring_bytes"] + told["overhead_bytes"] > 0.9 * BUDGET
        assert cgroup.oom_kills == 0
