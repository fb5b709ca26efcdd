"""`edgeinfer plan`: where every byte of a model goes, the prediction, and what it says when there is no plan."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny  # noqa: F401  (puts benchmarks/ on the path)
from click.testing import CliRunner

from benchmarks.maker import make_model
from edgeinfer.cli import cli
from edgeinfer.modelfile import read_model_file

pytest.importorskip("edgeinfer._native", reason="needs the C extension")
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    make_model(path, "llama", "Q4_0", size=150_000_000, vocabulary=20_000)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def plan(model, tmp_path_factory):
    """Runs the command on the model, with measurements of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}

    def plan(*args):
        command = [sys.executable, "-m", "edgeinfer", "plan", str(model), "--ctx", "256", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)

    return plan


@pytest.fixture(scope="module")
def budget(plan):
    """A little more than the smallest one that works."""
    return int(re.search(r"\((\d+) bytes\)", plan("--memory", "1MiB").stderr)[1]) + 16 * MIB


def test_every_weight_has_its_place_and_the_bytes_add_up(plan, model, budget):
    result = plan("--memory", budget, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    weights = {tensor.name: tensor.nbytes for tensor in read_model_file(model).tensors}
    assert facts["mode"] == "streaming" and facts["budget_bytes"] == budget
    assert {name: len(places) for name, places in facts["tensors"].items()} == dict.fromkeys(weights, 1)
    for place, stated in (("resident", facts["resident_bytes"]), ("streamed", facts["streamed_bytes_per_token"])):
        assert stated == sum(weights[name] for name, places in facts["tensors"].items() if places == [place])
        assert stated == sum(part.get(place, 0) for part in facts["parts"].values()) > 0
    assert sum(sum(part.values()) for part in facts["parts"].values()) == facts["weights_bytes"] == sum(weights.values())
    assert facts["tensors"]["token_embd.weight"] == ["rows"]
    ledger = facts["ledger"]
    assert ledger["resident_weights"] == facts["resident_bytes"] and ledger["ring"] == facts["ring_bytes"] > 0
    assert 0.95 * budget <= sum(ledger.values()) <= budget
    bound = facts["disk_bytes_per_second"] / facts["streamed_bytes_per_token"]
    assert 0 < facts["predicted_tokens_per_second"] <= bound * 1.001


def test_for_people(plan, budget):
    text = plan("--memory", budget).stdout
    assert "weights are streamed" in text and "ring for streamed weights" in text
    for part in ("feed-forward", "attention", "embedding", "output", "norms", "KV cache", "total"):
        assert re.search(rf"^{part} ", text, re.MULTILINE), part
    assert re.search(r"^Reads \S+ MiB a token; the disk gives \S+ GB/s\.$", text, re.MULTILINE)
    assert re.search(r"^Predicted: \S+ tokens/s; with 1 GiB more: \S+ tokens/s\.$", text, re.MULTILINE)


def test_everything_fits(plan):
    assert "everything stays in memory" in plan("--memory", "1GiB").stdout
    assert json.loads(plan("--memory", "1GiB", "--json").stdout)["streamed_bytes_per_token"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "lots"], "The size 'lots' cannot be read."),
        (["--memory", "1MiB"], "The budget of 1.00 MiB is too small for this model: the smallest that works is"),
    ],
)
def test_what_cannot_be_planned_is_one_message(plan, args, message):
    result = plan(*args)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1


def test_a_system_that_cannot_stream_is_told(model, monkeypatch):
    monkeypatch.setattr("edgeinfer.engines.opening.streaming_support", lambda: False)
    monkeypatch.setattr("edgeinfer.cli.plan.streaming_support", lambda: False)
    result = CliRunner().invoke(cli, ["plan", str(model), "--memory", "50MiB"])
    assert result.exit_code == 0 and "everything stays in memory" in result.stdout
    assert result.stderr.startswith("Streaming is off on this system: the model is held in memory")
