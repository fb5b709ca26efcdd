"""Weights in few bits: their kernels lay them out by the address of the memory that they are in."""

import gc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_references import THREADS, assert_same, stock_outputs

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import process_memory
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.onnx.aligned_data import align_data
from edgeinfer.onnx.homes import give_back_memory
from edgeinfer.onnx.prepare import prepare
from edgeinfer.onnx.prepared import Prepared

MIB = 1 << 20
LAYERS, WIDTH = 40, 768  # packed, such a weight ends at an odd place


def model_of(path, bits, block, zero_points):
    """LAYERS products by a square matrix each, with the input added."""
    rng = np.random.default_rng(bits)
    blocks = -(-WIDTH // block)
    nodes, weights, value = [], [], "x"
    for layer in range(LAYERS):
        arrays = {
            "q": rng.integers(0, 256, (WIDTH, blocks, block * bits // 8), np.uint8),
            "scales": rng.uniform(1e-4, 2e-4, (WIDTH, blocks)).astype(np.float32),
            "zeros": rng.integers(0, 256, (WIDTH, -(-blocks * bits // 8)), np.uint8),
        }
        if not zero_points:
            del arrays["zeros"]
        weights += [numpy_helper.from_array(array, f"{name}{layer}") for name, array in arrays.items()]
        names = [f"{name}{layer}" for name in arrays]
        sizes = {"K": WIDTH, "N": WIDTH, "bits": bits, "block_size": block, "accuracy_level": 4}
        product = helper.make_node(
            "MatMulNBits", [value, *names], [f"p{layer}"], domain="com.microsoft", **sizes
        )
        nodes += [product, helper.make_node("Add", [f"p{layer}", "x"], [f"v{layer}"])]
        value = f"v{layer}"
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH])] for name in ("x", value)
    ]
    graph = helper.make_graph(nodes, "products", *ports, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits, block", [(4, 32), (8, 128)])
def test_staged_outputs_are_the_stock_sessions(bits, block, zero_points, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = model_of(tmp_path / "m.onnx", bits, block, zero_points)
    x = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    expected = stock_outputs(path, {"x": x})
    assert all(np.isfinite(array).all() for array in expected.values())
    gc.collect()
    give_back_memory()
    room = 52 * MIB  # too little for one session: 64 MiB are kept free beside its weights
    with open_onnx(path, memory=process_memory().rss_bytes + room, threads=THREADS) as staged:
        assert staged.mode == "streaming" and staged.plan.num_stages > 1
        for _ in range(2):
            assert_same(staged.run({"x": x}), expected)


def test_every_part_lies_where_kernels_want_it(tmp_path):
    path = model_of(tmp_path / "m.onnx", 8, 128, True)
    folder = tmp_path / "prepared"
    folder.mkdir()
    prepare(path, folder, 4 * MIB)
    for files in Prepared.read(folder).stages:
        model = onnx.load(folder / files.model, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key.startswith("prepacked"):
                    offsets = [int(part.split(";")[0]) for part in entry.value.split("|")[1:]]
                    assert offsets and all(offset % 64 == 0 for offset in offsets), entry.value
        before = (folder / files.data).read_bytes()
        align_data(folder / files.model, folder / files.data)
        assert (folder / files.data).read_bytes() == before, "what lies well is left alone"
    assert not list(folder.glob("*.aligned"))
