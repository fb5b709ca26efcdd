"""`edgeinfer replay` as a user sees it: table, JSON, picture, messages."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import tiny_model

from edgeinfer.cli import cli
from edgeinfer.experts.trace import Trace, model_fingerprint
from edgeinfer.modelfile import read_model_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.traces import made_trace  # noqa: E402

native = pytest.importorskip("edgeinfer._native", reason="the C extension is not built")

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "routing.npz"
    trace = made_trace(120, 6, 16, 2, prompt=20)
    predicted = np.full((120, 6, 4), -1, np.int16)
    predicted[:, 1:, :2] = trace.routed[:, 1:]  # a gate that is always right
    replace(trace, model="tiny \x1b[31m & <co>", predicted=predicted).write(path)
    return path


def run(*args):
    return CliRunner().invoke(cli, ["replay", *map(str, args)])


def test_the_table_lists_every_policy_and_predictor(file):
    result = run(file, "--memory", "48MiB")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].endswith("6 layers of 16 experts, 2 used a token; 120 tokens, 100 of them decoded")
    assert lines[1] == "A cache of 48 of 96 experts, 48.0 MiB of 96.0 MiB"
    rows = {line.split()[0]: line.split() for line in lines[3:] if line}
    assert set(native.Policy.names()) | {"Belady", "gate", "path", "recurrence"} <= set(rows)
    assert rows["lrfu"][1] == "(default)"
    assert rows["gate"] == ["gate", "100.0%", "100.0%", "100.0%", "100.0%"]
    assert rows["Belady"][2] == "1.000"
    assert "\x1b" not in result.output


def test_json_has_exactly_the_documented_keys(file):
    facts = json.loads(run(file, "--memory", "48MiB", "--json", "--policy", "lru", "--policy", "gdsf").output)
    assert sorted(facts) == sorted(
        "model architecture fingerprint num_tokens num_decoded_tokens num_layers num_experts "
        "num_experts_used num_slots cache_bytes belady policies predictors expert_use".split()
    )
    assert list(facts["policies"]) == ["lru", "gdsf"]
    lru = facts["policies"]["lru"]
    assert lru["of_belady"] == pytest.approx(lru["decode"] / facts["belady"]["decode"])
    assert np.sum(facts["expert_use"], axis=1).tolist() == [240] * 6
    assert facts["predictors"]["gate"]["recall_by_layer"] == [None, 1, 1, 1, 1, 1]


def test_a_read_token_is_what_missed(file):
    """Two experts of 1 MiB in each of 6 layers: 12 MiB without a hit."""
    facts = json.loads(run(file, "--memory", "24MiB", "--json").output)
    row = next(line for line in run(file, "--memory", "24MiB").output.splitlines() if line.startswith("lru "))
    assert float(row.split()[-2]) == pytest.approx(12 * (1 - facts["policies"]["lru"]["decode"]), abs=0.01)


def test_the_picture_has_a_curve_a_policy_and_a_row_a_layer(file, tmp_path):
    result = run(file, "--memory", "48MiB", "--picture", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    curves = root.findall(f"{SVG}polyline")
    assert len(curves) == len(native.Policy.names()) + 1
    for curve in curves:
        points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
        assert points == sorted(points) and len(points) >= 12
        assert points[-1][1] < points[0][1]  # more memory, more hits
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"lrfu", "Belady", "48.0 MiB", "96.0 MiB", "most used expert"} <= set(texts)
    assert texts[0] == "tiny  [31m & <co>: 6 layers of 16 experts, 2 used a token"
    rows = {rect.get("y") for rect in root.findall(f"{SVG}rect") if rect.get("x", "").startswith("620")}
    assert len(rows) == 6


def test_a_picture_of_prompts_alone(tmp_path):
    trace = made_trace(30, 1, 8, 2, prompt=30)
    trace.write(tmp_path / "t.npz")
    result = run(tmp_path / "t.npz", "--memory", "4MiB", "--picture", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    assert "nothing to judge" in result.output and "0 of them decoded" in result.output
    assert "prompts only" in (tmp_path / "p.svg").read_text()


def test_the_model_of_the_trace_is_checked(tmp_path):
    model = tiny_model(tmp_path, "olmoe", "Q4_0", layers=2)
    trace = replace(made_trace(20, 2, 8, 2), fingerprint=model_fingerprint(read_model_file(model)))
    trace.write(tmp_path / "t.npz")
    assert run(tmp_path / "t.npz", "--memory", "8MiB", "--model", model).exit_code == 0
    other = tiny_model(tmp_path, "olmoe", "Q4_0", layers=3)
    result = run(tmp_path / "t.npz", "--memory", "8MiB", "--model", other)
    assert result.exit_code == 1
    assert result.output.startswith("Error: The trace was recorded with made routing (none, fingerprint ")
    assert f"but {other} is" in result.output and result.output.count("\n") == 1


def test_a_budget_below_one_layers_experts_names_one_that_works(file):
    result = run(file, "--memory", "2097151")
    assert result.exit_code == 1
    assert "A token uses 2 experts in a layer" in result.output
    assert "Expected at least 2097152 bytes (--memory 2097152)." in result.output
    assert run(file, "--memory", "2097152").exit_code == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--policy", "best"],
            "There is no cache policy 'best'. Expected one of lrfu, lru, lfu, arc, layers, gdsf.",
        ),
        (["--picture", "p.png"], "Pictures are SVG files: expected a name that ends in .svg, found 'p.png'."),
        (
            ["--picture", "/no/such/p.svg"],
            "The picture /no/such/p.svg cannot be written: No such file or directory.",
        ),
        (["--model", "/no/such.gguf"], "/no/such.gguf"),
        (["--memory", "much"], "The size 'much' cannot be read."),
    ],
)
def test_what_cannot_be_is_explained(file, options, message):
    result = run(file, "--memory", "48MiB", *options)
    assert (result.exit_code, message in result.output) == (1, True), result.output


def test_a_truncated_trace_and_a_model_are_no_traces(file, tmp_path):
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-30])
    result = run(tmp_path / "cut.npz", "--memory", "48MiB")
    assert result.exit_code == 1 and "The file is cut short or damaged" in result.output
    model = tiny_model(tmp_path, "olmoe", "Q4_0", layers=2)
    result = run(model, "--memory", "48MiB")
    assert result.exit_code == 1 and "found a file that starts with b'GGUF'" in result.output


def test_memory_is_required_and_the_command_is_listed(file):
    assert run(file).exit_code == 2
    assert "replay" in CliRunner().invoke(cli, ["--help"]).output
    assert Trace.read(file).num_tokens == 120
