"""Preparing in a process of its own: within its memory, or stage by stage; a crash is told."""

import os
from contextlib import closing

import numpy as np
import onnx
import pytest
from made_encoders import FLOAT, TABLE, Encoder, encoder_file, tokens
from onnx_references import THREADS, assert_same, stock_outputs

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import Ledger, process_memory
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.errors import BudgetError, EngineError, ModelFileError
from edgeinfer.onnx import preparing, tables
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.plan import OnnxPlan
from edgeinfer.onnx.prepare import prepare
from edgeinfer.onnx.prepared import Prepared
from edgeinfer.onnx.preparing import prepare_in_child
from edgeinfer.onnx.stages import Stages

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeinfer" / "onnx"


@pytest.fixture
def half(tmp_path):
    """An encoder of float16, which ONNX Runtime turns into float32 on a processor: twice the weights, all
    in memory.
    """
    path = encoder_file(tmp_path, FLOAT)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    path = tmp_path / "half.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="half.onnx.data")
    return path


def test_weights_that_grow_are_prepared_as_a_whole_where_they_fit(half, tmp_path):
    (tmp_path / "out").mkdir()
    prepare_in_child(half, tmp_path / "out", 4 * MIB, 1000 * MIB)
    assert Prepared.read(tmp_path / "out").reason == ""


def test_weights_that_grow_beyond_memory_are_prepared_piece_by_piece(half, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_LEAST_BYTES", 60 * MIB)
    (tmp_path / "out").mkdir()
    prepare_in_child(half, tmp_path / "out", 4 * MIB, 60 * MIB)
    prepared = Prepared.read(tmp_path / "out")
    assert len(prepared.stages) > 5 and "optimized one by one" in prepared.reason
    listed = {name for files in prepared.stages for name in (files.model, files.data)}
    assert set(os.listdir(tmp_path / "out")) <= listed | {"manifest.json"}


def test_pieces_compute_what_the_model_says(half, monkeypatch):
    monkeypatch.setattr(preparing, "_LEAST_BYTES", 60 * MIB)
    expected = stock_outputs(half, tokens(2))["hidden"].astype(np.float32)
    with open_onnx(half, memory=process_memory().rss_bytes + 75 * MIB, threads=THREADS) as model:
        assert model.mode == "streaming" and "optimized one by one" in model.plan.reason
        found = model.run(tokens(2))["hidden"].astype(np.float32)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_table_may_be_larger_than_the_memory_for_preparing(tmp_path):
    """Rows of it are looked up, so its bytes go from file to file."""
    path = encoder_file(tmp_path, Encoder(layers=2, width=512, ffn=2048, vocabulary=100_000))  # 205 MB of it
    (tmp_path / "out").mkdir()
    prepare_in_child(path, tmp_path / "out", 4 * MIB, 150 * MIB)
    assert "one by one" not in Prepared.read(tmp_path / "out").reason


@pytest.mark.parametrize("piecewise", [False, True])
def test_tables_that_are_kept_aside_are_the_same_weights(tmp_path, monkeypatch, piecewise):
    monkeypatch.setattr(tables, "LARGE_BYTES", 1 * MIB)
    path = encoder_file(tmp_path, TABLE)
    (tmp_path / "out").mkdir()
    prepare(path, tmp_path / "out", 1 * MIB, piecewise=piecewise)
    prepared = Prepared.read(tmp_path / "out")
    (found,) = (table for files in prepared.stages for table in files.tables)
    stage = next(files for files in prepared.stages if files.tables)
    original = next(tensor for tensor in read_onnx(path).tensors if tensor.name == "embedding")
    assert found.nbytes == original.nbytes == 20_000 * found.row_bytes
    with open(original.path, "rb") as theirs, open(tmp_path / "out" / stage.data, "rb") as ours:
        theirs.seek(original.offset)
        ours.seek(found.offset)
        assert ours.read(found.nbytes) == theirs.read(original.nbytes)
    expected = stock_outputs(path, tokens(2, vocabulary=20_000))
    with closing(Stages(path, tmp_path / "out", prepared, THREADS, 1 << 26)) as stages:
        resident = frozenset(block.name for block in stages.blocks)
        stages.arm(OnnxPlan("streaming", 0, Ledger(), resident=resident))
        outputs = stages.run(tokens(2, vocabulary=20_000), list(expected))
    if piecewise:  # its fusions are others
        np.testing.assert_allclose(outputs["hidden"], expected["hidden"], rtol=0, atol=1e-5)
    else:
        assert_same(outputs, expected)


def test_piece_by_piece_is_exact_where_fusions_change_nothing(tmp_path):
    """Constants inside the graph become weights of the stages that use them."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, value = [], "x"
    for number in range(6):
        matrix = numpy_helper.from_array(rng.standard_normal((200, 200)).astype(np.float32) / 14, "value")
        nodes.append(helper.make_node("Constant", [], [f"w{number}"], value=matrix))
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [f"p{number}"]))
        nodes.append(helper.make_node("Tanh", [f"p{number}"], [f"t{number}"]))
        value = f"t{number}"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 200]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    path = tmp_path / "constants.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    (tmp_path / "out").mkdir()
    prepare(path, tmp_path / "out", 0, num_cuts=3, piecewise=True)
    prepared = Prepared.read(tmp_path / "out")
    assert [len(files.ranges) for files in prepared.stages] and len(prepared.stages) == 4
    assert sum(len(files.ranges) for files in prepared.stages) == 6  # each in one stage, mapped
    stages = Stages(path, tmp_path / "out", prepared, THREADS, 1 << 26)
    stages.arm(OnnxPlan("streaming", 0, Ledger(), resident=frozenset(block.name for block in stages.blocks)))
    feeds = {"x": rng.standard_normal((3, 200)).astype(np.float32)}
    assert_same(stages.run(feeds, [value]), stock_outputs(path, feeds))
    stages.close()


def test_a_process_that_is_killed_asks_for_memory(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(preparing, "_LEAST_BYTES", 1 * MIB)
    monkeypatch.setattr(preparing, "_run", _always_killed)
    path = encoder_file(tmp_path, Encoder(layers=4, width=256, ffn=1024))
    with pytest.raises(
        BudgetError, match="was killed, most likely for want of memory. Give a larger --memory"
    ):
        open_onnx(path, memory=process_memory().rss_bytes + 40 * MIB)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def _always_killed(*_arguments):
    raise preparing._Killed()


def test_a_process_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing.sys, "executable", "/bin/false")
    with pytest.raises(
        EngineError, match="could not be prepared: its process ended with code 1: it said nothing"
    ):
        prepare_in_child(tmp_path / "x.onnx", tmp_path, MIB, 1000 * MIB)


def test_what_it_raises_is_raised_here(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(ModelFileError, match="bad.onnx is not an ONNX model"):
        prepare_in_child(tmp_path / "bad.onnx", tmp_path, MIB, 1000 * MIB)
