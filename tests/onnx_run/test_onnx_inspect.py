"""`edgeinfer inspect` and `plan` on ONNX files, against the onnx package and ONNX Runtime; forms that are
found."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_kit import MODELS, bare_session, command, error_of, needs_data, save_model

from edgeinfer.budget import process_memory, reset_peak
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.forms import find_form, form_names, read_form
from edgeinfer.onnx.graph import read_onnx

FILES = {
    "silero_vad.onnx": "silero-vad",
    "silero_vad_16k_op15.onnx": "silero-vad",
    "gtcrn_simple.onnx": "gtcrn",
    "FastestDet.onnx": "fastestdet",
    "mobilenet_v2_int8_B.onnx": "imagenet",
    "resnet-tiny-beans.onnx": None,
    "ultraface-rfb-320.onnx": "ultraface",
    "ppocrv3-det.onnx": "ppocr-det",
    "magika/model.onnx": "magika",
}


def operators(graph):
    """Counts, in subgraphs too."""
    found = Counter()
    for node in graph.node:
        found[f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += operators(inner)
    return found


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_facts_equal_those_of_onnx(name):
    result = command("inspect", MODELS / name, "--json")
    assert result.returncode == 0, result.stderr.decode()
    facts, model, session = json.loads(result.stdout), onnx.load(MODELS / name), bare_session(MODELS / name)
    assert facts["operators"] == dict(operators(model.graph))
    assert facts["opsets"] == {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    assert (facts["producer"], facts["ir_version"]) == (model.producer_name, model.ir_version)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sizes = {tensor["name"]: tensor for tensor in facts["tensors"]}
    for key, array in stored.items():
        assert sizes[key]["shape"] == list(array.shape) and sizes[key]["nbytes"] == array.nbytes
    assert sum(facts["bytes_by_type"].values()) == facts["weights_bytes"] <= facts["file_bytes"]
    for side, ports in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert [port["name"] for port in facts[side]] == [port.name for port in ports]
        for port, known in zip(facts[side], ports):
            pairs = zip(port["shape"], known.shape, strict=True)  # ONNX Runtime fills in sizes that follow
            assert all(stated == size for stated, size in pairs if isinstance(stated, int))
    assert facts["form"] == FILES[name]


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_the_engine_finds_the_same_form(name):
    with open_onnx(MODELS / name, threads=1) as model:
        form = find_form(model.inputs, model.outputs)
    assert (form.name if form else None) == FILES[name]


@needs_data
def test_tables():
    lines = command("inspect", MODELS / "gtcrn_simple.onnx").stdout.decode().splitlines()
    for words in (
        "form          gtcrn",
        "conv_cache: float32 [2, 1, 16, 16, 33]  state, from conv_cache_out",
    ):
        assert any(line.strip() == words for line in lines), words
    assert any(line.startswith("operators (") for line in lines)
    text = command("plan", MODELS / "gtcrn_simple.onnx").stdout.decode()
    assert "everything stays in memory" in text and "Computed on cpu." in text and "total" in text
    facts = json.loads(command("plan", MODELS / "gtcrn_simple.onnx", "--json").stdout)
    assert facts["mode"] == "in-memory" and facts["streamed_bytes_per_pass"] == 0
    assert sum(facts["ledger"].values()) <= facts["budget_bytes"]


@needs_data
def test_a_budget_that_is_too_small_is_refused():
    assert "the smallest that works" in error_of(
        command("plan", MODELS / "FastestDet.onnx", "--memory", "8MiB")
    )


def test_text_of_the_file_cannot_command_the_terminal(tmp_path):
    node = helper.make_node("Identity", ["x\x1b[2J"], ["y"])
    path = save_model(tmp_path / "m.onnx", [node], [("x\x1b[2J", np.float32, [1])], [("y", np.float32, [1])])
    text = command("inspect", path).stdout.decode()
    assert r"x\x1b[2J" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a GGUF model"),
        (b"\x08\x09", "is not an ONNX model"),
        (b"\x08\x09\x3a\xff\xff\x03abc", "is not an ONNX model"),
    ],
)
def test_files_that_are_no_model(tmp_path, data, words):
    (tmp_path / "m.onnx").write_bytes(data)
    for name in ("inspect", "plan"):
        message = error_of(command(name, tmp_path / "m.onnx"))
        assert words in message or not data
        assert "m.onnx" in message


def test_reading_what_is_in_a_file_maps_no_weights(tmp_path):
    """Where the page cache holds the file in large pieces, as when it was just written, a touched byte maps
    all of its piece."""
    if not reset_peak():
        pytest.skip("the peak of a process cannot be reset here")
    size = 48
    parts = [np.full((1 << 18,), number, np.float32) for number in range(size)]  # 1 MiB each
    weights = [onnx.numpy_helper.from_array(part, f"w{number}") for number, part in enumerate(parts)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Sum", [tensor.name for tensor in weights], ["y"])], "g", [],
        [value("y", TensorProto.FLOAT, [1 << 18])], weights,
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    del weights, graph
    reset_peak()
    before = process_memory()
    file = read_onnx(path)
    assert process_memory().peak_rss_bytes - before.rss_bytes < 16 << 20
    found = [(tensor.name, tensor.nbytes) for tensor in file.tensors]
    assert found == [(f"w{number}", 1 << 20) for number in range(size)]


def test_every_form_can_be_read():
    assert {"fastestdet", "gtcrn", "silero-vad", "yolov8"} <= set(form_names())
    for name in form_names():
        form = read_form(name)
        assert (
            form.name == name and form.about.endswith(".") and form.match["inputs"] and form.match["outputs"]
        )
