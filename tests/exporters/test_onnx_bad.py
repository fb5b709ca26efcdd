"""What bad ONNX input gets: one clear error, and nothing left behind."""

import errno
import os
import resource
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from real_onnx import MODELS, needs_data

from edgeinfer.cli import cli
from edgeinfer.errors import EdgeInferError, ExportError, ModelFileError
from edgeinfer.exporters.onnx_export import export_onnx


def product(path, size=64, **external):
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((size, size)).astype(np.float32), "w")
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])] for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", *ports, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, **external)
    return path


def outside(path, location):
    """The model at `path`, its data where `location` says."""
    product(path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    return path


def refused(source, words, kind=EdgeInferError, **options):
    before = sorted(source.parent.iterdir())
    with pytest.raises(kind, match=words):
        export_onnx(source, source.with_name("out.onnx"), **options)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/../../w.bin"])
def test_external_data_outside_the_folder(location, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(64 * 64 * 4))
    refused(outside(tmp_path / "m" / "m.onnx", location), "outside|folder", ModelFileError)


def test_external_data_missing_or_short(tmp_path):
    refused(outside(tmp_path / "m.onnx", "none.bin"), "none.bin", ModelFileError)
    source = outside(tmp_path / "m.onnx", "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(100))
    refused(source, "w.bin.*(short|bytes)", ModelFileError)


@pytest.mark.parametrize(
    "data", [b"", b"not a model at all", b"\x80\x02}q\x00.", b"\x08\x08:\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_model(data, tmp_path):
    (tmp_path / "m.onnx").write_bytes(data)
    refused(tmp_path / "m.onnx", "not an ONNX model|is empty", ModelFileError)


@needs_data
def test_bytes_that_flip(tmp_path):
    """Whatever comes, it is an error of edgeinfer's or a model."""
    rng = np.random.default_rng(11)
    names, seen = ["gtcrn", "silero_16k", "beans", "magika"], Counter()
    originals = {name: MODELS[name].read_bytes() for name in names}
    for turn in range(40):
        data = bytearray(originals[names[turn % 4]])
        for _ in range(rng.integers(1, 4)):
            where = rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 60_000))
            data[where] = rng.integers(256)
        (tmp_path / "m.onnx").write_bytes(data)
        quant = [None, "F16", "INT8", "INT4"][rng.integers(4)]
        try:
            export_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx", quant=quant, force=True)
            seen["exported"] += 1
        except EdgeInferError:
            seen["refused"] += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"m.onnx", "out.onnx", "out.onnx.data"}
    assert min(seen["exported"], seen["refused"]) > 3


def test_an_existing_target_is_kept(tmp_path):
    source = product(tmp_path / "m.onnx")
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
        refused(source, "exists already.*--force", ExportError)
        assert (tmp_path / name).read_bytes() == b"old"
        (tmp_path / name).unlink()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files acts as a full disk does."""
    product(tmp_path / "m.onnx", size=512)
    for limit in (200_000, 900):

        def limited(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "edgeinfer", "export", "m.onnx", "-o", "out.onnx"]
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=limited, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 1, done.stderr
        assert "The disk is full" in done.stderr and os.strerror(errno.EFBIG) in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_names_of_types(tmp_path):
    source = product(tmp_path / "m.onnx")
    for word, kind in (("float16", "F16"), ("int8-dynamic", "INT8"), ("fp32", "F32"), ("int4", "INT4")):
        assert export_onnx(source, tmp_path / "out.onnx", quant=word, force=True).type == kind
    refused(source, "--quant q4_0 is not for ONNX. Expected one of F32", quant="q4_0")
    refused(source, "--quant INT8_STATIC needs --calibration", quant="int8-static")


@needs_data
@pytest.mark.parametrize("name", ["silero", "silero_16k"])
def test_a_check_finds_inputs_that_a_model_takes(name, tmp_path):
    done = CliRunner().invoke(cli, ["export", str(MODELS[name]), "-o", str(tmp_path / "m.onnx"), "--check"])
    assert done.exit_code == 0 and "passed" in done.output, done.output


def test_a_check_uses_what_is_given(tmp_path):
    source = product(tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32))
    words = ["export", source, "-o", tmp_path / "out.onnx", "--calibration", tmp_path / "x.npz", "--check"]
    for more in ([], ["--quant", "int8_static"], ["--quant", "F16"]):
        done = CliRunner().invoke(cli, list(map(str, [*words, "--force", *more])))
        assert done.exit_code == 0 and "at 5 positions" in done.output, done.output


@pytest.mark.parametrize(
    "rows, words",
    [
        (np.zeros((0, 64)), "no numbers in it"),
        (np.full((1, 64), np.nan), "'x' has .*NaN"),
        (np.full((1, 64), np.inf), "'x' has infinite"),
    ],
)
def test_calibration_that_says_nothing(tmp_path, rows, words):
    source = product(tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=rows.astype(np.float32))
    refused(source, words, ExportError, quant="INT8_STATIC", calibration=tmp_path / "x.npz")
