"""The importance matrix, against the same sums from PyTorch; its file, against the gguf package."""

import ctypes
import importlib.util
import re
import sys

import gguf
import numpy as np
import pytest
import torch
from stories import ROOT
from tiny import tiny_model

from edgeinfer.errors import BudgetError, EngineError, ExportError, ModelFileError
from edgeinfer.exporters import windows as windows_module
from edgeinfer.exporters.importance import Importance, gather_importance, load_importance
from edgeinfer.exporters.nodes import Node, operations
from edgeinfer.exporters.quantize import quantize_gguf
from edgeinfer.exporters.windows import scoring_engine, windows
from edgeinfer.modelfile import read_model_file

TEXT = (ROOT / "exporters" / "texts" / "page.txt").read_text()
CONTEXT = 128


@pytest.fixture(scope="module")
def training():
    """The modules of models/train, which are no package."""
    folder = str(ROOT / "models" / "train")
    sys.path.insert(0, folder)
    try:
        modules = {}
        for name in ("experts", "model", "export"):
            spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
            modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        yield modules
    finally:
        sys.path.remove(folder)
        for name in modules:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=["story", "story-moe"])
def model(request, training, tmp_path_factory):
    """(GGUF in float32, the same weights in PyTorch)."""
    path = tmp_path_factory.mktemp("float") / f"{request.param}.gguf"
    quantize_gguf(ROOT / "models" / f"{request.param}.gguf", path, "F32", requantize=True)
    stored = {t.name: torch.tensor(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}
    network = training["model"].Model(training["model"].CONFIGS[request.param]).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            stack = re.sub(r"\.experts\.\d+\.", ".experts.", name)
            values = stored[training["export"].gguf_name(stack)]
            if stack != name:
                values = values[int(re.search(r"\.experts\.(\d+)\.", name)[1])]
            parameter.copy_(values.reshape(parameter.shape))
    return path, network


def sums_by_pytorch(network, parts, gguf_name):
    """GGUF name -> (sums of squared inputs, counts), by hooks on every matrix."""
    sums, counts = {}, {}

    def watch(name, matrix, columns, matrices):
        key = gguf_name(name)
        sums.setdefault(key, np.zeros((matrices, columns)))
        counts.setdefault(key, np.zeros(matrices))

        def add(_module, inputs):
            rows = inputs[0].detach().reshape(-1, columns).double()
            rows = rows[rows.abs().sum(1) > 0]  # experts are given rows of zeros to round their number
            sums[key][matrix] += rows.square().sum(0).numpy()
            counts[key][matrix] += len(rows)

        return add

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            expert = re.search(r"\.experts\.(\d+)\.", name)
            stack = re.sub(r"\.experts\.\d+\.", ".experts.", name) + ".weight"
            count = network.config.num_experts if expert else 1
            module.register_forward_pre_hook(
                watch(stack, int(expert[1]) if expert else 0, module.in_features, count)
            )
    key = "token_embd.weight"  # tied: the output matrix too
    sums[key], counts[key] = np.zeros((1, network.config.embedding_length)), np.zeros(1)

    def add_output(_module, _inputs, output):
        rows = output.detach().reshape(-1, output.shape[-1]).double()
        sums[key][0] += rows.square().sum(0).numpy()
        counts[key][0] += len(rows)

    network.norm.register_forward_hook(add_output)
    with torch.no_grad():
        for part in parts:
            network(torch.tensor([part]))
    return sums, counts


def test_sums_are_pytorchs(model, training):
    path, network = model
    found = gather_importance(path, TEXT, context=CONTEXT, threads=1)
    with scoring_engine(path, context=CONTEXT, threads=1) as engine:
        parts = windows(engine.model, TEXT, CONTEXT, "a test")
    sums, counts = sums_by_pytorch(network, parts, training["export"].gguf_name)
    routers = {name for name in found.sums if name.endswith("ffn_gate_inp.weight")}
    assert found.sums.keys() - routers == sums.keys() and (found.chunks, found.chunk_tokens) == (
        len(parts),
        CONTEXT,
    )
    for name, expected in sums.items():
        # llama.cpp's attention is float16: a token between two experts may go to the other
        assert np.abs(counts[name] - found.counts[name]).sum() <= 4, name
        tolerance = 0.1 if len(expected) > 1 else 0.01
        np.testing.assert_allclose(
            found.sums[name], expected, rtol=tolerance, atol=0.01 * expected.max(), err_msg=name
        )
        np.testing.assert_allclose(found.sums[name].sum(), expected.sum(), rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_streaming_gives_the_same_sums(tmp_path, monkeypatch, arch):
    """Also where a batch wants more experts than fit: what it did before it was given up does not count."""
    model = tiny_model(tmp_path, arch, "F16", layers=3, ffn=1024)
    text = TEXT[:500]
    plain = gather_importance(model, text, context=64, threads=1)
    with pytest.raises(BudgetError) as refused:
        gather_importance(model, text, context=64, threads=1, memory=1 << 20)
    monkeypatch.setattr(windows_module, "_plain", None)  # for what fits
    memory = refused.value.smallest_bytes + (1 << 20)
    streamed = gather_importance(model, text, context=64, threads=1, memory=memory)
    assert streamed.sums.keys() == plain.sums.keys()
    for name, sums in plain.sums.items():
        assert streamed.counts[name].sum() == plain.counts[name].sum()
        # other kernels compute fewer tokens at once, and a token between two experts may go to the other
        assert np.abs(streamed.counts[name] - plain.counts[name]).sum() <= 4
        np.testing.assert_allclose(streamed.sums[name].sum(), sums.sum(), rtol=1e-2)


def test_every_matrix_is_seen_by_every_token(tmp_path):
    """Also the output matrix, of which stock programs compute the last token only."""
    model = tiny_model(tmp_path, "qwen2", "F16", layers=2)
    found = gather_importance(model, TEXT, context=64, threads=1)
    assert {count for counts in found.counts.values() for count in counts} == {found.tokens}
    assert "output.weight" in found.sums and "token_embd.weight" not in found.sums
    assert found.unused_experts() == 0


def test_the_file_is_as_llama_imatrix_writes_it(model, tmp_path):
    path, _network = model
    found = gather_importance(path, TEXT, context=CONTEXT, threads=1, origin="page.txt")
    found.save(tmp_path / "matrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "matrix.gguf")
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == {
        "general.type",
        "imatrix.datasets",
        "imatrix.chunk_count",
        "imatrix.chunk_size",
    }
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["page.txt"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(found.sums)
    for name, sums in found.sums.items():
        written, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        assert list(written.shape) == [sums.shape[1], sums.shape[0]] and list(counts.shape) == [
            1,
            sums.shape[0],
        ]
        np.testing.assert_array_equal(np.array(written.data).reshape(sums.shape), sums)
    again = load_importance(tmp_path / "matrix.gguf")
    assert (again.chunks, again.chunk_tokens, again.origin) == (found.chunks, CONTEXT, "matrix.gguf")
    assert all(np.array_equal(again.weights(name), found.weights(name)) for name in found.sums)


def test_an_expert_that_was_never_used_counts_as_even():
    sums = {"x": np.array([[4.0, 8.0], [0.0, 0.0]], np.float32)}
    importance = Importance(sums, {"x": np.array([2, 0])}, 1, 512, "made")
    assert importance.weights("x").tolist() == [2.0, 4.0, 1.0, 1.0] and importance.unused_experts() == 1


ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"x": ONE}, "is no importance matrix: expected a GGUF file of type 'imatrix'"),
        ({"a.in_sum2": ONE}, "has a.in_sum2, but no a.counts"),
        ({"a.in_sum2": np.full((1, 4), np.nan, np.float32), "a.counts": ONE}, "sums of a are not all finite"),
        (
            {"a.in_sum2": -np.ones((1, 4), np.float32), "a.counts": ONE},
            "sums of a are not all finite and positive",
        ),
        ({"a.in_sum2": np.ones((1, 4), np.float16), "a.counts": ONE}, "a.in_sum2 is F16, expected F32"),
        (
            {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones((3, 1), np.float32)},
            "4 sums for 3 matrices",
        ),
    ],
)
def test_files_that_are_no_matrix(tmp_path, tensors, words):
    path = tmp_path / "matrix.gguf"
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=words):
        load_importance(path)


def test_other_files(tmp_path):
    with pytest.raises(ExportError, match="is no importance matrix"):
        load_importance(ROOT / "models" / "story.gguf")
    old = tmp_path / "imatrix.dat"
    old.write_bytes(
        (200).to_bytes(4, "little") + (19).to_bytes(4, "little") + b"blk.0.attn_k.weight" + bytes(99)
    )
    with pytest.raises(ExportError, match="llama.cpp's old form. Convert it: llama-imatrix --in-file"):
        load_importance(old)
    with pytest.raises(ModelFileError, match="is not a GGUF model"):
        load_importance(ROOT / "models" / "story.md")
    with pytest.raises(ModelFileError, match="there is no such file"):
        load_importance(tmp_path / "none.gguf")


def test_texts_and_models_that_give_nothing(tmp_path):
    model = tiny_model(tmp_path, "llama", "F32", layers=1)
    with pytest.raises(
        ExportError, match="The text for calibration is too short: it has .* tokens, expected 512"
    ):
        gather_importance(model, "Too short.", threads=1)
    broken = tmp_path / "broken.gguf"
    data = bytearray(model.read_bytes())
    norm = read_model_file(model).tensor("blk.0.attn_norm.weight")
    data[norm.offset : norm.offset + 4] = np.float32(np.inf).tobytes()
    broken.write_bytes(data)
    with pytest.raises(ExportError, match="is multiplied by is not finite on this text. The model is broken"):
        gather_importance(broken, TEXT, context=64, threads=1)


def test_a_node_is_llama_cpps_tensor(monkeypatch):
    operations()
    shifted = [("more", ctypes.c_void_p), *Node._fields_]
    other = type("Node", (Node.__bases__[0],), {"_fields_": shifted, "source": Node.source})
    monkeypatch.setattr("edgeinfer.exporters.nodes.Node", other)
    operations.cache_clear()
    with pytest.raises(EngineError, match="not laid out as edgeinfer reads them"):
        operations()
    monkeypatch.undo()
    operations.cache_clear()
    operations()
