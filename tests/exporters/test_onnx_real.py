"""Every real ONNX model, exported as floats and quantized, against ONNX Runtime on the original."""

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_layout import check_layout
from real_onnx import MODELS, differences, feeds_of, needs_data, outputs, page, session

from edgeinfer.errors import ExportError
from edgeinfer.exporters.onnx_export import export_onnx

pytestmark = needs_data


def _exported(name, folder, feeds=None, **options):
    """(report, path, differences of the outputs on real inputs)."""
    feeds = feeds or feeds_of(name)
    path = folder / "out.onnx"
    report = export_onnx(MODELS[name], path, **options)
    check_layout(path)
    assert {found.name for found in folder.iterdir() if found.is_file()} == set(report.files)
    return report, path, differences(outputs(MODELS[name], feeds), outputs(path, feeds))


@pytest.mark.parametrize("name", MODELS)
def test_floats_are_the_same(name, tmp_path):
    report, path, found = _exported(name, tmp_path)
    assert max(largest for largest, _ in found) < 1e-5
    size = MODELS[name].stat().st_size
    assert report.bytes < size * 1.02 + 4096 * len(check_layout(path))
    model, source = onnx.load(path, load_external_data=False), onnx.load(MODELS[name])
    assert {node.domain for node in model.graph.node} <= {node.domain for node in source.graph.node}
    ports = [(port.name, port.type, port.shape) for port in session(path).get_inputs()]
    assert ports == [(port.name, port.type, port.shape) for port in session(MODELS[name]).get_inputs()]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mobilenet"}))
def test_float16(name, tmp_path):
    report, path, found = _exported(name, tmp_path, quant="F16")
    assert max(error for _, error in found) < 0.01
    saved = MODELS[name].stat().st_size - report.bytes + 4096 * len(check_layout(path))
    assert saved > 1.9 * report.parameters
    assert {port.type for port in session(path).get_outputs()} <= {"tensor(float)", "tensor(int64)"}
    assert all(port.type != "tensor(float16)" for port in session(path).get_inputs())


def test_float16_of_a_quantized_model_keeps_its_classes(tmp_path):
    feeds = feeds_of("mobilenet")
    export_onnx(MODELS["mobilenet"], tmp_path / "out.onnx", quant="F16")
    for before, after in zip(
        outputs(MODELS["mobilenet"], feeds), outputs(tmp_path / "out.onnx", feeds), strict=True
    ):
        assert set(np.argsort(before[0][0])[-3:]) == set(np.argsort(after[0][0])[-3:])


@pytest.mark.parametrize(
    "name, quant, operators, error",
    [
        ("silero", "INT8", 4, 0.02),
        ("silero_16k", "INT8", 2, 0.02),
        ("magika", "INT8", 2, 0.03),
        ("gtcrn", "INT8", 2, 0.02),
        ("magika", "INT4", 2, 0.08),
        ("gtcrn", "INT4", 2, 0.03),
    ],
)
def test_fewer_bits(name, quant, operators, error, tmp_path):
    report, _, found = _exported(name, tmp_path, quant=quant)
    assert report.quantized == operators
    assert max(found_error for _, found_error in found) < error
    if quant == "INT8":
        assert any("convolutions stay in float32" in note for note in report.notes)


@pytest.mark.parametrize("quant", ["INT8", "INT4"])
@pytest.mark.parametrize("name", ["detector", "beans", "faces", "text", "mobilenet"])
def test_what_has_nothing_to_quantize_says_so(name, quant, tmp_path):
    with pytest.raises(ExportError, match=f"{quant} is for the weights of .*INT8_STATIC.*--calibration"):
        export_onnx(MODELS[name], tmp_path / "out.onnx", quant=quant)
    assert list(tmp_path.iterdir()) == []


def _calibration(folder, feeds):
    folder.mkdir()
    for i, sample in enumerate(feeds):
        np.savez(folder / f"{i:03}.npz", **sample)
    return folder


@pytest.mark.parametrize("quant", ["INT8_STATIC", "INT8_TENSORRT"])
@pytest.mark.parametrize(
    "name, error", [("beans", 0.03), ("faces", 0.03), ("magika", 0.15), ("detector", 0.35), ("text", 0.6)]
)
def test_static(name, quant, error, tmp_path):
    feeds = feeds_of(name)
    samples = [page(seed) for seed in range(1, 5)] if name == "text" else feeds
    folder = tmp_path / "out"
    folder.mkdir()
    calibration = _calibration(tmp_path / "data", samples)
    report, path, found = _exported(name, folder, feeds, quant=quant, calibration=calibration)
    assert report.quantized > 2 and max(found_error for _, found_error in found) < error
    if name != "magika":
        assert report.bytes < 0.45 * MODELS[name].stat().st_size + 4096 * len(check_layout(path))
    if name in ("beans", "magika"):
        for before, after in zip(outputs(MODELS[name], feeds), outputs(path, feeds), strict=True):
            assert np.argmax(before[0]) == np.argmax(after[0])
    zeros = _zero_points(path)
    assert all(zero == 0 for zero in zeros) == (quant == "INT8_TENSORRT")
    types = _dequantized_types(path)
    expected = {"INT8_TENSORRT": {TensorProto.INT8}, "INT8_STATIC": {TensorProto.INT8, TensorProto.INT32}}
    assert types == expected[quant] or name == "magika" and types <= expected[quant]


def _zero_points(path):
    model = onnx.load(path)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [int(values[node.input[2]]) for node in quantizers]


def _dequantized_types(path):
    """Of the weights and biases: TensorRT refuses int32."""
    model = onnx.load(path, load_external_data=False)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return {types[node.input[0]] for node in nodes if node.input[0] in types}


def test_static_leaves_what_the_library_cannot_do(tmp_path):
    """gtcrn has transposed convolutions in groups, for which the library takes a wrong number of scales."""
    calibration = _calibration(tmp_path / "data", feeds_of("gtcrn"))
    (tmp_path / "out").mkdir()
    report, _, found = _exported("gtcrn", tmp_path / "out", quant="INT8_STATIC", calibration=calibration)
    assert report.quantized > 10 and found[0][1] < 0.2


def test_a_static_voice_detector_hears_the_same(tmp_path):
    feeds = feeds_of("silero_16k")
    calibration = _calibration(tmp_path / "data", feeds[:100])
    (tmp_path / "out").mkdir()
    _, path, _ = _exported("silero_16k", tmp_path / "out", quant="INT8_STATIC", calibration=calibration)
    heard = [[found[0].item() > 0.5 for found in outputs(model, feeds)] for model in (MODELS["silero_16k"], path)]
    assert np.mean(np.equal(*heard)) > 0.9


_SCRIPT = """
import sys
from edgeinfer.exporters.onnx_export import export_onnx
export_onnx(sys.argv[1], sys.argv[2], quant=sys.argv[3] or None, force=True)
"""


@pytest.mark.parametrize("name, quant", [("silero", ""), ("silero", "INT8"), ("detector", "F16"), ("magika", "INT4")])
def test_the_same_model_gives_the_same_bytes(name, quant, tmp_path):
    seen = set()
    for seed in ("1", "2"):
        path = tmp_path / "out.onnx"
        command = [sys.executable, "-c", _SCRIPT, MODELS[name], path, quant]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}, timeout=120)
        files = [path, tmp_path / "out.onnx.data"]
        seen.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(seen) == 1
