"""Models that few people have and that are valid all the same: staged, they compute what one session does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_references import THREADS, assert_same, stock_outputs

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.onnx.plan import make_plan
from edgeinfer.onnx.prepare import prepare
from edgeinfer.onnx.prepared import Prepared
from edgeinfer.onnx.stages import Stages

WIDTH = 160
ROWS = 6144  # of a table of whole pages
_NUMBERS = np.random.default_rng(0)


def numbers(*shape):
    return (_NUMBERS.standard_normal(shape) / 16).astype(np.float32)


def save(path, nodes, weights, inputs=(("x", TensorProto.FLOAT, ["rows", WIDTH]),), functions=(), **more):
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        **more,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    onnx.save_model(model, path)
    return path


def check(path, *all_feeds, num_cuts=99, piecewise=False):
    """In as many stages as there may be, everything streamed, then everything kept."""
    folder = path.parent / f"prepared-{num_cuts}-{piecewise}"
    folder.mkdir()
    prepare(path, folder, 0, num_cuts=num_cuts, piecewise=piecewise)
    stages = Stages(path, folder, Prepared.read(folder), THREADS, 1 << 28)
    try:
        for measuring in (True, False):
            stages.arm(make_plan(stages.blocks, stages.num_stages, 1 << 30, {}, measuring))
            for feeds in all_feeds:
                assert_same(stages.run(feeds, ["y"]), stock_outputs(path, feeds))
    finally:
        stages.close()
    return [block for block in stages.blocks if block.table]


def product(value, weight, result):
    return helper.make_node("MatMul", [value, weight], [result])


CHAIN = [product("x", "a", "1"), helper.make_node("Tanh", ["1"], ["2"]), product("2", "b", "y")]


def batch(rows):
    return {"x": numbers(rows, WIDTH)}


def test_a_batch_without_rows(tmp_path):
    weights = {"a": numbers(WIDTH, WIDTH), "b": numbers(WIDTH, WIDTH)}
    check(save(tmp_path / "m.onnx", CHAIN, weights), batch(0), batch(3), batch(0))


@pytest.mark.parametrize("piecewise", [False, True])
@pytest.mark.parametrize("linear", [False, True], ids=["pairs", "linear"])
def test_sparse_weights(tmp_path, linear, piecewise):
    places = np.arange(0, WIDTH * WIDTH, 13)
    indices = places if linear else np.stack(np.unravel_index(places, (WIDTH, WIDTH)), axis=1)
    values = numpy_helper.from_array(numbers(len(places)), "a")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "where"), [WIDTH, WIDTH])
    path = save(tmp_path / "m.onnx", CHAIN, {"b": numbers(WIDTH, WIDTH)}, sparse_initializer=[tensor])
    check(path, batch(3), piecewise=piecewise)


@pytest.mark.parametrize("piecewise", [False, True])
def test_functions_of_the_models_own(tmp_path, piecewise):
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(numbers(WIDTH, WIDTH)))
    nodes = [constant, product("in", "k", "1"), helper.make_node("Tanh", ["1"], ["out"])]
    function = helper.make_function("own", "Block", ["in"], ["out"], nodes, [helper.make_opsetid("", 17)])
    calls = [helper.make_node("Block", ["x"], ["h"], domain="own"), product("h", "a", "g")]
    calls.append(helper.make_node("Block", ["g"], ["y"], domain="own"))
    path = save(tmp_path / "m.onnx", calls, {"a": numbers(WIDTH, WIDTH)}, functions=[function])
    check(path, batch(3), piecewise=piecewise)


def test_texts_between_stages(tmp_path):
    nodes = [
        product("x", "a", "1"),
        helper.make_node("Cast", ["1"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Cast", ["whole"], ["texts"], to=TensorProto.STRING),
        product("1", "b", "2"),
        helper.make_node("Cast", ["texts"], ["3"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["2", "3"], ["y"]),
    ]
    weights = {"a": numbers(WIDTH, WIDTH) * 20, "b": numbers(WIDTH, WIDTH)}
    check(save(tmp_path / "m.onnx", nodes, weights), batch(3))


def test_a_model_may_have_any_name(tmp_path):
    weights = {"a": numbers(WIDTH, WIDTH), "b": numbers(WIDTH, WIDTH)}
    check(save(tmp_path / "edgeinfer-optimized.onnx", CHAIN, weights), batch(2))


@pytest.mark.parametrize(
    "kinds, wanted, is_table",
    [
        ([TensorProto.INT32], [1, 6143, -6144, (1 << 32) + 5, -(1 << 33) - 1], True),
        ([TensorProto.INT8, TensorProto.INT32], [1, 100, 256 + 5], False),
    ],
    ids=["32 bits", "8 bits"],
)
def test_rows_by_indices_that_a_cast_wraps(tmp_path, kinds, wanted, is_table):
    """A row that is looked up and was not brought in would end the process."""
    nodes, name = [], "ids"
    for kind in kinds:
        nodes.append(helper.make_node("Cast", [name], [f"{name}."], to=kind))
        name += "."
    nodes += [helper.make_node("Gather", ["table", name], ["rows"]), product("rows", "a", "y")]
    weights = {"table": numbers(ROWS, WIDTH), "a": numbers(WIDTH, WIDTH)}
    path = save(tmp_path / "m.onnx", nodes, weights, [("ids", TensorProto.INT64, ["n"])])
    tables = check(path, *({"ids": np.array([number])} for number in wanted), num_cuts=0)
    assert bool(tables) == is_table
