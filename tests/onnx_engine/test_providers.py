"""Which provider computes, and what is said about it."""

import pytest

from edgeinfer.errors import BudgetError, EngineError
from edgeinfer.onnx import providers
from edgeinfer.onnx.providers import choose_provider, what_computes

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class Session:
    def __init__(self, *loaded):
        self._loaded = list(loaded)

    def get_providers(self):
        return self._loaded


def test_the_processor_where_nothing_else_is():
    choice = choose_provider(None, ["AzureExecutionProvider", CPU])
    assert choice.name == "cpu" and choice.chain == (CPU,)
    assert "neither CUDA nor TensorRT" in choice.reason


def test_cuda_where_it_is():
    choice = choose_provider(None, [TENSORRT, CUDA, CPU])
    assert choice.name == "cuda" and choice.chain == (CUDA, CPU)


def test_tensorrt_unasked_on_a_jetson_only(tmp_path, monkeypatch):
    monkeypatch.setattr(providers, "_JETSON", tmp_path)
    choice = choose_provider(None, [TENSORRT, CUDA, CPU])
    assert choice.name == "tensorrt" and choice.chain == (TENSORRT, CUDA, CPU)
    assert "Jetson" in choice.reason


def test_what_is_asked_for():
    assert choose_provider("cpu", [CUDA, CPU]).chain == (CPU,)
    assert choose_provider("tensorrt", [TENSORRT, CUDA, CPU]).name == "tensorrt"


def test_what_cannot_be_had():
    with pytest.raises(
        EngineError, match="'cuda' is not in this onnxruntime .*, which has cpu. Install onnxruntime-gpu"
    ):
        choose_provider("cuda", [CPU])
    with pytest.raises(EngineError, match="'npu' is unknown. Expected one of cpu, cuda, tensorrt"):
        choose_provider("npu", [CPU])


def test_a_provider_that_does_not_load_is_said():
    wanted = choose_provider(None, [CUDA, CPU])
    assert what_computes(wanted, Session(CUDA, CPU)) == wanted
    found = what_computes(wanted, Session(CPU))
    assert found.name == "cpu" and "CUDAExecutionProvider could not be loaded" in found.reason


def test_the_plan_says_what_computes(tmp_path, monkeypatch):
    from made_encoders import Encoder, encoder_file

    from edgeinfer.engines.onnx import open_onnx

    path = encoder_file(tmp_path, Encoder(layers=1, width=128, ffn=256))
    with open_onnx(path) as model:
        assert model.plan.provider == "cpu" and "onnxruntime" in model.plan.provider_reason
    with pytest.raises(EngineError, match="'cuda' is not in this onnxruntime"):
        open_onnx(path, provider="cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(BudgetError, match="cuda needs all of it"):
        open_onnx(path, provider="cuda", memory=1 << 20)
