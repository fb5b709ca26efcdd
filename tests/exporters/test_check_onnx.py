"""`--check` on ONNX models: inputs that fit, every output compared, and checkpoints that became ONNX."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeinfer.errors import ExportError, InputError
from edgeinfer.exporters.check import check
from edgeinfer.exporters.check_onnx import OnnxModel

DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_models = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")


def made(path, nodes, inputs, outputs, weights, opset=17):
    """An ONNX file. `inputs`, `outputs`: name -> (type, shape); `weights`: name -> array."""
    ports = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "made", *ports, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def classifier(path, weights=None, dtype=np.float32, out="scores"):
    """Embedding of tokens, their product with a matrix."""
    rng = np.random.default_rng(3)
    table, matrix = rng.standard_normal((50, 16)), rng.standard_normal((16, 7))
    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    made(
        path,
        [("Gather", ["table", "ids64"], ["embedded"]), ("MatMul", ["embedded", "matrix"], [out])],
        {"ids64": (TensorProto.INT64, ["batch", "length"])},
        {out: (kind, ["batch", "length", 7])},
        {
            "table": table.astype(dtype),
            "matrix": (matrix if weights is None else weights(matrix)).astype(dtype),
        },
    )
    return path


def test_same_model(tmp_path):
    source = classifier(tmp_path / "a.onnx")
    report = check(source, source)
    assert report.passed and report.source == "ONNX Runtime" and report.precision == "F32"
    assert report.positions == 8 and report.largest_difference == 0 and report.top_agreement == 1
    assert report.limit == 1e-4 and report.source_perplexity is None
    assert not any("perplexity" in line for line in report.lines())


def test_numbers_are_those_of_the_outputs(tmp_path):
    source, result = (
        classifier(tmp_path / "a.onnx"),
        classifier(tmp_path / "b.onnx", lambda matrix: matrix * 1.5),
    )
    with_inputs = {"ids64": np.array([[1, 4, 4]])}
    report = check(source, result, inputs=with_inputs)
    rng = np.random.default_rng(3)
    table, matrix = rng.standard_normal((50, 16)), rng.standard_normal((16, 7))
    expected = np.abs(table[[1, 4, 4]] @ matrix)
    assert report.positions == 3
    assert report.largest_difference == pytest.approx(expected.max() / 2, rel=1e-5)
    assert report.mean_difference == pytest.approx(expected.mean() / 2, rel=1e-5)
    assert report.relative_difference == pytest.approx(0.5, rel=1e-5) and report.top_agreement == 1
    assert not report.passed and "output 'scores': the largest difference is" in report.failure


def test_float16_within_its_rounding(tmp_path):
    source = classifier(tmp_path / "a.onnx")
    report = check(source, classifier(tmp_path / "b.onnx", dtype=np.float16))
    assert report.passed and report.precision == "F16" and report.limit == 32 * 2**-11
    assert 1e-5 < report.relative_difference < 1e-2
    wrong = classifier(tmp_path / "c.onnx", lambda matrix: matrix[::-1], np.float16)
    assert "that rounding to F16 explains" in check(source, wrong).failure


def test_tokens_are_within_the_table(tmp_path):
    """The embedding has 50 rows: any other index would be refused by ONNX Runtime."""
    model = OnnxModel(classifier(tmp_path / "a.onnx"))
    model.open()
    seen = np.concatenate([model.made_inputs(seed)["ids64"].ravel() for seed in range(60)])
    assert seen.min() == 0 and seen.max() == 49
    assert np.array_equal(model.made_inputs(7)["ids64"], model.made_inputs(7)["ids64"])


def test_inputs_have_the_declared_shapes_and_types(tmp_path):
    kinds = {
        "pictures": (TensorProto.FLOAT, ["n", "c", "h", "w"]),
        "attention_mask": (TensorProto.INT64, ["batch", "past + length"]),
        "past": (TensorProto.FLOAT, ["batch", 2, "past", 4]),
        "flags": (TensorProto.BOOL, [3]),
        "half": (TensorProto.FLOAT16, [2, 5]),
        "rate": (TensorProto.INT64, []),
    }
    nodes = [("Identity", [name], [f"{name}_out"]) for name in kinds]
    path = made(
        tmp_path / "a.onnx", nodes, kinds, {f"{name}_out": value for name, value in kinds.items()}, {}
    )
    model = OnnxModel(path)
    model.open()
    found = model.made_inputs()
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {
        "pictures": (1, 3, 64, 64),
        "attention_mask": (1, 8),
        "past": (1, 2, 0, 4),
        "flags": (3,),
        "half": (2, 5),
        "rate": (),
    }
    assert (
        found["attention_mask"].all() and found["half"].dtype == np.float16 and found["flags"].dtype == bool
    )
    assert abs(float(found["pictures"].mean())) < 0.1 and 0.9 < found["pictures"].std() < 1.1
    assert check(path, path).passed


def test_outputs_of_other_shapes(tmp_path):
    source = classifier(tmp_path / "a.onnx")
    result = made(
        tmp_path / "b.onnx",
        [("Identity", ["ids64"], ["scores"])],
        {"ids64": (TensorProto.INT64, ["batch", "length"])},
        {"scores": (TensorProto.INT64, ["batch", "length"])},
        {},
    )
    report = check(source, result)
    assert report.failure == "output 'scores' has the shape [1, 8, 7] in the source and [1, 8] in the result"


def test_outputs_without_numbers(tmp_path):
    kinds = {"text": (TensorProto.STRING, [2])}
    path = made(
        tmp_path / "a.onnx",
        [("Identity", ["text"], ["same"])],
        kinds,
        {"same": (TensorProto.STRING, [2])},
        {},
    )
    with pytest.raises(
        ExportError, match="No string can be made for the input 'text'. Give the inputs yourself"
    ):
        check(path, path)
    with pytest.raises(
        ExportError, match=r"none of its outputs \(same\) is one of the source's with numbers"
    ):
        check(path, path, inputs={"text": np.array(["a", "b"], object)})


def test_an_output_that_is_missing(tmp_path):
    source, result = classifier(tmp_path / "a.onnx"), classifier(tmp_path / "b.onnx", out="others")
    with pytest.raises(ExportError, match="has no output scores: it was made from another model"):
        check(source, result)


def test_inputs_that_do_not_fit(tmp_path):
    source = classifier(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="no input 'x'"):
        check(source, source, inputs={"x": np.zeros(3)})
    with pytest.raises(
        ExportError, match=r"ONNX Runtime refused .*\(inputs: ids64 \[1, 1\]\). Give inputs that it takes"
    ):
        check(source, source, inputs={"ids64": np.array([[99]])})


def test_onnx_against_gguf(tmp_path):
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ExportError, match="expected two GGUF or two ONNX models"):
        check(classifier(tmp_path / "a.onnx"), tmp_path / "b.gguf")


@needs_models
@pytest.mark.parametrize(
    "name", ["FastestDet.onnx", "gtcrn_simple.onnx", "ultraface-rfb-320.onnx", "resnet-tiny-beans.onnx"]
)
def test_real_models_in_float16(tmp_path, name):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = Path(DATA) / "onnx" / name
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), tmp_path / "half.onnx")
    report = check(source, tmp_path / "half.onnx")
    assert report.passed and report.precision == "F16" and report.relative_difference > 0


@needs_models
def test_a_real_model_of_8_bits_is_not_judged():
    source = Path(DATA) / "onnx" / "mobilenet_v2_int8_B.onnx"
    report = check(source, source)
    assert report.passed and report.precision is None and report.limit is None


# ---- checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(encoder, decoder): folders with a checkpoint and the model.onnx that torch.onnx makes of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.BertModel(
        transformers.BertConfig(vocab_size=60, max_position_embeddings=64, **size)
    )
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, use_cache=False, **size))
    folders = []
    for model, outputs in ((encoder, ["last_hidden_state"]), (decoder, ["logits"])):
        folder = tmp_path_factory.mktemp("checkpoint")
        model.eval().save_pretrained(folder)
        names = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
        ids = torch.arange(6)[None]
        torch.onnx.export(
            _First(model), (ids, torch.ones_like(ids)), folder / "model.onnx", input_names=[*names],
            output_names=outputs, dynamic_axes=names, dynamo=False,
        )  # fmt: skip
        folders.append(folder)
    return folders


def _First(model):
    import torch

    class First(torch.nn.Module):
        """Only the first output."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    return First()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [0, 1], ids=["encoder", "decoder"])
def test_checkpoints_that_became_onnx(checkpoints, kind, tmp_path):
    folder = checkpoints[kind]
    report = check(folder, folder / "model.onnx")
    assert report.passed and report.source == "PyTorch" and report.positions >= 60
    assert 0 < report.relative_difference < 1e-5 and report.top_agreement == 1
    assert (report.result_perplexity is None) == (kind == 0)
    if kind == 1:
        assert report.result_perplexity == pytest.approx(report.source_perplexity, rel=1e-5)
        assert 30 < report.source_perplexity < 120  # 60 tokens, weights are random
    proto = onnx.load(folder / "model.onnx")
    matrix = [tensor for tensor in proto.graph.initializer if tensor.name.startswith("onnx::MatMul")][-1]
    matrix.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(matrix) * np.float32(3), matrix.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    assert "more than the 1.0e-04" in check(folder, tmp_path / "wrong.onnx").failure
