"""Models with what real ones have seldom: subgraphs, shared and odd weights, functions, old and new operators."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx_layout import check_layout
from real_onnx import session

from edgeinfer.exporters.onnx_export import export_onnx
from edgeinfer.exporters.onnx_float16 import half

RANDOM = np.random.default_rng(3)


def weight(*shape, scale=1.0):
    return (RANDOM.standard_normal(shape) * scale / shape[0] ** 0.5).astype(np.float32)


def save(path, text, weights, **external):
    """A model in ONNX's text form with these weights; `external`: arguments of onnx.save."""
    model = parser.parse_model(text)
    for name, array in weights.items():
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(array)
        tensor.name = name
        model.graph.initializer.append(tensor)
    onnx.save(model, path, **external)
    return path


def export(source, quant=None, **options):
    target = source.with_name(f"{quant}.onnx")
    report = export_onnx(source, target, quant=quant, **options)
    check_layout(target)
    return report, target


def run(path, **feeds):
    return session(path).run(None, feeds)


def error(before, after):
    return max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(before, after, strict=True))


HEAD = '<ir_version: 8, opset_import: ["" : {opset}]> g (float[n, 64] x) => (float[n, 64] y)'
PRODUCT = HEAD + " {{ y = MatMul(x, w) }}"
X = RANDOM.standard_normal((3, 64)).astype(np.float32)


@pytest.mark.parametrize("quant", [None, "F16", "INT8", "INT4"])
@pytest.mark.parametrize("opset", [11, 13, 17, 21, 23])
def test_old_and_new_operators(opset, quant, tmp_path):
    source = save(tmp_path / "m.onnx", PRODUCT.format(opset=opset), {"w": weight(64, 64)})
    _, target = export(source, quant)
    limit = {None: 1e-6, "F16": 2e-3, "INT8": 0.03, "INT4": 0.2}[quant]
    assert error(run(source, x=X), run(target, x=X)) < limit


def test_the_newest_operators_that_onnx_runtime_knows(tmp_path):
    text = PRODUCT.replace("ir_version: 8", "ir_version: 10")
    for opset in range(onnx.defs.onnx_opset_version(), 20, -1):
        source = save(tmp_path / "m.onnx", text.format(opset=opset), {"w": weight(64, 64)})
        try:
            session(source)
        except ort.capi.onnxruntime_pybind11_state.Fail:
            continue
        _, target = export(source, "F16")
        assert onnx.load(target, load_external_data=False).opset_import[0].version == opset
        return
    pytest.fail("no version works")


LOOP = (
    HEAD.format(opset=17)
    + """ {
  count = Constant <value_int = 3> ()
  yes = Constant <value = bool {1}> ()
  y = Loop (count, yes, x) <body = step (int64 i, bool before, float[n, 64] state)
    => (bool after, float[n, 64] next) {
    after = Identity (before)
    a = MatMul (state, w)
    k = CumSum (a, one)
    c = MatMul (k, inner)
    next = Tanh (c)
  }>
}"""
)


@pytest.mark.parametrize("quant, limit", [(None, 1e-6), ("F16", 5e-3), ("INT8", 0.1), ("INT4", 0.5)])
def test_loops(quant, limit, tmp_path):
    """One weight is the body's own, the other is captured from outside."""
    source = save(tmp_path / "m.onnx", LOOP, {"w": weight(64, 64, scale=0.2), "one": np.array(1)})
    model = onnx.load(source)
    body = next(a.g for node in model.graph.node for a in node.attribute if a.name == "body")
    body.initializer.append(numpy_helper.from_array(weight(64, 64), "inner"))
    onnx.save(model, source)
    report, target = export(source, quant)
    assert error(run(source, x=X), run(target, x=X)) < limit
    assert len(check_layout(target)) >= 2 and report.quantized == (2 if quant in ("INT8", "INT4") else 0)


BRANCHES = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 64] x, bool choice) => (float[n, 64] y) {
  y = If (choice) <
    then_branch = yes () => (float[n, 64] a) { a = MatMul (x, w) },
    else_branch = no () => (float[n, 64] b) { d = MatMul (x, w) b = Relu (d) }
  >
}"""


def _branches(path, same):
    model = parser.parse_model(BRANCHES)
    first = weight(64, 64)
    for attribute in model.graph.node[0].attribute:
        attribute.g.initializer.append(numpy_helper.from_array(first, "w"))
        first = first if same else weight(64, 64)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("quant, limit", [(None, 1e-6), ("F16", 2e-3), ("INT8", 0.03), ("INT4", 0.2)])
def test_branches_whose_weights_have_one_name(quant, limit, tmp_path):
    source = _branches(tmp_path / "m.onnx", same=False)
    _, target = export(source, quant)
    for choice in (True, False):
        feeds = {"x": X, "choice": np.array(choice)}
        assert error(run(source, **feeds), run(target, **feeds)) < limit


@pytest.mark.parametrize("quant", [None, "F16", "INT8", "INT4"])
def test_equal_weights_of_branches_are_there_once(quant, tmp_path):
    _, target = export(_branches(tmp_path / "m.onnx", same=True), quant)
    assert len({place for _, place, _ in check_layout(target)}) == 1
    pages = {None: 4, "F16": 2, "INT8": 1, "INT4": 1}[quant]
    assert (tmp_path / f"{quant}.onnx.data").stat().st_size == pages * 4096


def test_a_weight_that_several_operators_use(tmp_path):
    text = HEAD.format(opset=17) + " { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Gemm<transB=1>(c, w) }"
    source = save(tmp_path / "m.onnx", text, {"w": weight(64, 64)})
    for quant, tensors, limit in ((None, 1, 1e-5), ("F16", 1, 5e-3), ("INT8", 2, 0.05), ("INT4", 2, 0.3)):
        _, target = export(source, quant)
        assert error(run(source, x=X), run(target, x=X)) < limit
        assert len({place for _, place, _ in check_layout(target)}) == tensors


def test_activations_are_quantized_once(tmp_path):
    text = HEAD.format(opset=17) + " { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"
    source = save(tmp_path / "m.onnx", text, {"w": weight(64, 64), "v": weight(64, 64)})
    _, target = export(source, "INT8")
    kinds = [node.op_type for node in onnx.load(target).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1 and kinds.count("MatMulInteger") == 2


@pytest.mark.parametrize("quant, limit", [("INT8", 0.02), ("INT4", 0.2)])
def test_gemm_with_bias(quant, limit, tmp_path):
    text = HEAD.format(opset=17) + " { y = Gemm<transB=1>(x, w, b) }"
    source = save(tmp_path / "m.onnx", text, {"w": weight(64, 64), "b": weight(64)})
    _, target = export(source, quant)
    assert error(run(source, x=X), run(target, x=X)) < limit


def test_embeddings_in_8_bits_have_a_scale_for_each_row(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (int64[n] ids) => (float[n, 32] y) { y = Gather(w, ids) }'
    table = weight(500, 32) * np.geomspace(1e-3, 1e3, 500, dtype=np.float32)[:, None]
    source = save(tmp_path / "m.onnx", text, {"w": table})
    _, target = export(source, "INT8")
    ids = np.array([0, 499, 250])
    found = run(target, ids=ids)[0]
    assert (np.abs(found - table[ids]).max(1) / np.abs(table[ids]).max(1)).max() < 0.005


def test_old_files_name_all_weights_as_inputs(tmp_path):
    """And some name settings so, which may be given when the model is run."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
      g (float[n, 64] x, float[64, 64] w, int64 axis) => (float[n, 64] y) {
      a = MatMul(x, w) y = CumSum(a, axis) }"""
    source = save(tmp_path / "m.onnx", text, {"w": weight(64, 64), "axis": np.array(1)})
    _, target = export(source)
    assert [port.name for port in session(target).get_inputs()] == ["x"]
    assert [port.name for port in session(target).get_overridable_initializers()] == ["axis"]
    for feeds in ({}, {"axis": np.array(0)}):
        assert error(run(source, x=X, **feeds), run(target, x=X, **feeds)) < 1e-6


FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[n, 64] x) => (float[n, 64] y) { a = own.twice(x, w) y = Relu(a) }
<domain: "own", opset_import: ["" : 17]> twice (a, b) => (c) { d = MatMul(a, b) c = Add(d, d) }"""


@pytest.mark.parametrize("quant, limit", [(None, 1e-6), ("F16", 3e-3), ("INT8", 0.05)])
def test_functions(quant, limit, tmp_path):
    source = save(tmp_path / "m.onnx", FUNCTION, {"w": weight(64, 64)})
    _, target = export(source, quant)
    assert error(run(source, x=X), run(target, x=X)) < limit


def test_what_is_computed_in_float16_stays_so(tmp_path):
    """ONNX Runtime's optimizer would write casts for this processor into the file."""
    text = HEAD.format(opset=17).replace("float[", "float16[") + " { a = MatMul(x, w) y = Relu(a) }"
    source = save(tmp_path / "m.onnx", text, {"w": weight(64, 64).astype(np.float16)})
    report, target = export(source)
    assert [node.op_type for node in onnx.load(target).graph.node] == ["MatMul", "Relu"]
    assert any("not simplified" in note for note in report.notes)
    feeds = {"x": X.astype(np.float16)}
    assert (run(source, **feeds)[0] == run(target, **feeds)[0]).all()


def test_weights_of_all_types(tmp_path):
    """4-bit integers are packed, large integers go outside, text stays inside."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
      g (int64[n] i) => (float[n, 64] y, int64[n] j, string[n] t, float[n, 64] z) {
      f = DequantizeLinear(q, s) y = Gather(f, i) j = Gather(big, i) t = Gather(words, i)
      z = Gather(doubles, i) }"""
    packed = helper.make_tensor("q", TensorProto.INT4, [64, 64], RANDOM.integers(-8, 8, 4096).tolist())
    words = helper.make_tensor("words", TensorProto.STRING, [64], [f"word {i}" * 20 for i in range(64)])
    plain = helper.make_tensor("doubles", TensorProto.FLOAT, [64, 64], weight(64, 64).ravel().tolist())
    weights = {"q": packed, "s": np.float32(0.1), "big": np.arange(64) ** 5, "words": words, "doubles": plain}
    source = save(tmp_path / "m.onnx", text, weights)
    _, target = export(source)
    feeds = {"i": np.array([3, 63, 0])}
    for before, after in zip(run(source, **feeds), run(target, **feeds), strict=True):
        assert before.dtype == after.dtype and (before == after).all()


def test_what_float16_cannot_hold(tmp_path):
    """Huge numbers (masks) stay finite, an epsilon stays above zero, sizes of Resize and counts stay exact."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y, float m) {
      a = Add(x, huge) b = Max(a, x) s = Sqrt(eps) d = Div(b, s) e = Clip(d, low, high)
      y = Resize<mode="nearest">(e, , scales) m = ReduceMax<keepdims=0>(y) }"""
    values = {"huge": -3e38, "eps": 1e-12, "low": -1.0, "high": 1.0}
    weights = {name: np.float32(value) for name, value in values.items()}
    weights["scales"] = np.array([1, 1, 2, 2], np.float32)
    source = save(tmp_path / "m.onnx", text, weights)
    _, target = export(source, "F16")
    x = np.full((1, 2, 4, 4), 1e-3, np.float32)
    for before, after in zip(run(source, x=x), run(target, x=x), strict=True):
        assert np.isfinite(after).all() and np.abs(before - after).max() < 1e-3


def test_a_model_without_float32_is_said_to_stay_as_it_is(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (double[1, 4] x) => (double[1, 4] y) { y = MatMul(x, w) }"""
    source = save(tmp_path / "m.onnx", text, {"w": np.eye(4) * 3})
    report, target = export(source, "F16")
    assert any("nothing became float16" in note for note in report.notes)
    assert np.array_equal(run(target, x=np.ones((1, 4)))[0], np.full((1, 4), 3.0))
    (tmp_path / "b").mkdir()
    report, _ = export(save(tmp_path / "b" / "m.onnx", PRODUCT.format(opset=17), {"w": weight(64, 64)}), "F16")
    assert not any("nothing became" in note for note in report.notes)


def test_half():
    numbers = np.array([0, -0.0, 1e-12, -1e-12, 1e30, -1e30, np.inf, -np.inf, 0.1, 70000], np.float32)
    found = half(numbers)
    assert found.dtype == np.float16 and np.isnan(half(np.array([np.nan], np.float32))[0])
    assert found[:4].tolist() == [0, 0, 2.0**-24, -(2.0**-24)]
    assert found[4:].tolist() == [65504, -65504, np.inf, -np.inf, np.float16(0.1), 65504]


def test_nothing_says_where_the_model_was_made(tmp_path):
    source = save(tmp_path / "m.onnx", PRODUCT.format(opset=17), {"w": weight(64, 64)})
    model = onnx.load(source)
    helper.set_model_props(model, {"labels": "cat,dog"})
    model.graph.node[0].doc_string = 'File "/home/someone/model.py", line 3'
    model.graph.node[0].metadata_props.add(key="stack", value="/home/someone/model.py")
    model.doc_string = model.graph.doc_string = "/home/someone"
    model.graph.initializer.append(numpy_helper.from_array(weight(64, 64), "unused"))
    onnx.save(model, source)
    _, target = export(source)
    assert b"/home/someone" not in target.read_bytes()
    assert session(target).get_modelmeta().custom_metadata_map == {"labels": "cat,dog"}
    assert len(check_layout(target)) == 1


def test_external_data_is_found_in_folders_below(tmp_path):
    (tmp_path / "weights").mkdir()
    place = {"save_as_external_data": True, "location": "weights/all.bin", "size_threshold": 0}
    source = save(tmp_path / "m.onnx", PRODUCT.format(opset=17), {"w": weight(64, 64)}, **place)
    before = run(source, x=X)
    for quant, limit in ((None, 1e-6), ("F16", 2e-3), ("INT8", 0.02), ("INT4", 0.2)):
        _, target = export(source, quant)
        assert error(before, run(target, x=X)) < limit


def test_a_model_that_is_a_link(tmp_path):
    """Caches of downloads hold links to files elsewhere."""
    (tmp_path / "blobs").mkdir()
    real = save(tmp_path / "blobs" / "a1b2", PRODUCT.format(opset=17), {"w": weight(64, 64)})
    (tmp_path / "m.onnx").symlink_to(real)
    _, target = export(tmp_path / "m.onnx")
    assert error(run(real, x=X), run(target, x=X)) < 1e-6


_MEASURE = """
import sys, threading, time
from pathlib import Path
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024
def watch():
    while True:
        most[0] = max(most[0], held("RssAnon"))
        time.sleep(0.005)
from edgeinfer.exporters.onnx_export import export_onnx
from edgeinfer.exporters.onnx_memory import needed_bytes
import onnxruntime.quantization
before, most = held("VmHWM"), [0]
threading.Thread(target=watch, daemon=True).start()
export_onnx(sys.argv[1], sys.argv[2], quant=sys.argv[3] or None)
print(held("VmHWM") - before, most[0], needed_bytes(Path(sys.argv[1]), sys.argv[3] or None) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant", ["", "F16", "INT8", "INT4"])
def test_memory_is_that_of_a_weight(quant, tmp_path):
    """Twelve weights of 32 MiB, one of which the optimizer transposes."""
    size = 2896
    weights = {f"w{i}": np.zeros((size, size), np.float32) for i in range(12)}
    steps = " ".join(f"a{i + 1} = MatMul(a{i}, w{i})" for i in range(11))
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, {size}] a0) => (float[n, {size}] y) {{
      {steps} t = Transpose(w11) y = MatMul(a11, t) }}"""
    place = {"save_as_external_data": True, "location": "m.data"}
    source = save(tmp_path / "m.onnx", text, weights, **place)
    del weights
    command = [sys.executable, "-c", _MEASURE, source, tmp_path / "out.onnx", quant]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    more, anonymous, needed = map(int, found.stdout.split())
    assert more < 250, "MiB more than before, for 384 MiB of weights"
    assert anonymous <= needed, "MiB that --memory asks for"
