"""What these tests share: the real models, small made ones, sounds, and a bare ONNX Runtime loop as the
reference."""

import os
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from edgeinfer.cli import cli

DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
MODELS = Path(DATA or "", "onnx")
IMAGES = Path(DATA or "", "images")
AUDIO = Path(DATA or "", "audio")


def command(*arguments, **options):
    """`edgeinfer ...`: in this process, or in one of its own where it has options such as `input`."""
    words = list(map(str, arguments))
    if options:
        line = [sys.executable, "-m", "edgeinfer", *words]
        return subprocess.run(line, capture_output=True, timeout=120, **options)
    result = CliRunner().invoke(cli, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(
        returncode=result.exit_code, stdout=result.stdout_bytes, stderr=result.stderr_bytes
    )


def run(model, *arguments, **options):
    return command("run", model, *arguments, **options)


def error_of(result):
    """The message of a command that failed as it should: exit code 1, nothing on standard output."""
    assert result.returncode == 1 and result.stdout == b"", (result.returncode, result.stdout, result.stderr)
    text = result.stderr.decode()
    assert text.count("Error: ") == 1 and "Traceback" not in text, text
    return text[text.index("Error: ") :].strip()


def bare_session(path):
    """Stock ONNX Runtime, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def read_wav(path):
    with wave.open(str(path)) as file:
        data = file.readframes(file.getnframes())
    return np.frombuffer(data, np.int16).astype(np.float32) / 32768


def write_wav(path, samples, rate=16000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.round(np.asarray(samples) * 32767).astype("<i2").tobytes())
    return path


def save_model(path, nodes, inputs, outputs, constants=(), opset=17, metadata=()):
    """`inputs`, `outputs`: (name, numpy type, shape); `constants`: (name, array)."""
    ports = [
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
            for name, kind, shape in side
        ]
        for side in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants]
    graph = helper.make_graph(nodes, "made", *ports, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    for key, value in metadata:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def running_sum(path, state_in="h", state_out="hn", size=4):
    """y = x + h, hn = y: what comes out shows every step before."""
    nodes = [
        helper.make_node("Add", ["x", state_in], ["y"]),
        helper.make_node("Identity", ["y"], [state_out]),
    ]
    shape = [1, size]
    return save_model(
        path, nodes, [("x", np.float32, shape), (state_in, np.float32, shape)],
        [("y", np.float32, shape), (state_out, np.float32, shape)],
    )  # fmt: skip


def constant_model(path, picture_shape, results, picture="images", metadata=()):
    """A picture goes in, always the same arrays come out: [(name, array)]."""
    nodes, constants = [], []
    nodes.append(helper.make_node("ReduceMean", [picture], ["mean"], keepdims=0))
    constants.append(("zero", np.float32(0)))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for name, array in results:
        constants.append((f"{name}_value", array.astype(np.float32)))
        nodes.append(helper.make_node("Add", [f"{name}_value", "nothing"], [name]))
    return save_model(
        path, nodes, [(picture, np.float32, picture_shape)],
        [(name, np.float32, list(array.shape)) for name, array in results], constants, metadata=metadata,
    )  # fmt: skip
