"""Models, inputs and references for the tests of the ONNX engine: what a single stock session gives."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

NAMES = (
    "silero_vad",
    "silero_vad_16k_op15",
    "gtcrn_simple",
    "FastestDet",
    "mobilenet_v2_int8_B",
    "resnet-tiny-beans",
    "ultraface-rfb-320",
    "ppocrv3-det",
    "magika/model",
)
#: Sizes of inputs whose shapes vary, or whose names mislead.
_SHAPES = {
    ("ppocrv3-det", "x"): (1, 3, 96, 160),
    ("resnet-tiny-beans", "pixel_values"): (2, 3, 224, 224),
    ("silero_vad", "input"): (1, 576),
    ("silero_vad_16k_op15", "input"): (1, 576),
}
THREADS = 1  # waking others takes longer than computing


def data_model(name):
    """The path of a real model, or a skip with the reason."""
    folder = os.environ.get("EDGEINFER_TEST_DATA")
    if not folder:
        pytest.skip("EDGEINFER_TEST_DATA does not name the folder with real models")
    return Path(folder) / "onnx" / f"{name}.onnx"


def stock_session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def random_feeds(path, seed=0):
    """Values for every input of the model."""
    rng = np.random.default_rng(seed)
    name = path.stem
    feeds = {}
    for port in stock_session(path).get_inputs():
        sizes = _SHAPES.get((name, port.name), [size if isinstance(size, int) else 1 for size in port.shape])
        if port.type == "tensor(float)":
            feeds[port.name] = rng.standard_normal(sizes).astype(np.float32)
        elif port.type == "tensor(int32)":
            feeds[port.name] = rng.integers(0, 256, sizes).astype(np.int32)
        else:
            feeds[port.name] = np.full(sizes, 16000, np.int64)  # the rate of a sound
    return feeds


def stock_outputs(path, feeds):
    """{name: array} of one stock session."""
    session = stock_session(path)
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds)))


def assert_same(found, expected):
    """Bit for bit, also where there are no numbers."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape
        assert found[name].tobytes() == expected[name].tobytes(), name
