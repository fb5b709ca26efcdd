"""Which execution provider of ONNX Runtime computes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from edgeinfer.errors import EngineError

#: Our name -> ONNX Runtime's.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_JETSON = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class Choice:
    """`name` of PROVIDERS; `chain`: what ONNX Runtime is given, in order; `reason`: for people."""

    name: str
    chain: tuple[str, ...]
    reason: str


def choose_provider(wanted: str | None = None, available: Sequence[str] | None = None) -> Choice:
    """The provider named `wanted` ("cpu", "cuda", "tensorrt"), or None: the best of those this onnxruntime
    has.

    TensorRT builds an engine for each model first, for minutes, so only a Jetson takes it unasked. Raises
    EngineError for one that is unknown or not there.
    """
    offered = list(ort.get_available_providers() if available is None else available)
    if wanted is not None and wanted not in PROVIDERS:
        raise EngineError(f"The provider {wanted!r} is unknown. Expected one of {', '.join(PROVIDERS)}.")
    there = [name for name, long_name in PROVIDERS.items() if long_name in offered]
    if wanted is not None and wanted not in there:
        raise EngineError(
            f"The provider {wanted!r} is not in this onnxruntime {ort.__version__}, which has "
            f"{', '.join(there)}. "
            "Install onnxruntime-gpu (on a Jetson, NVIDIA's own build) instead of onnxruntime."
        )
    if wanted is not None:
        return _choice(wanted, "It was asked for.")
    if "tensorrt" in there and _JETSON.exists():
        return _choice("tensorrt", "This is a Jetson, and this onnxruntime has TensorRT.")
    if "cuda" in there:
        return _choice("cuda", "This onnxruntime has CUDA.")
    return _choice("cpu", f"This onnxruntime {ort.__version__} has neither CUDA nor TensorRT.")


def _choice(name: str, reason: str) -> Choice:
    below = {"tensorrt": ("tensorrt", "cuda", "cpu"), "cuda": ("cuda", "cpu"), "cpu": ("cpu",)}[name]
    return Choice(name, tuple(PROVIDERS[each] for each in below), reason)


def what_computes(choice: Choice, session: ort.InferenceSession) -> Choice:
    """ONNX Runtime goes on without a provider that it cannot load (a missing library, no device): then
    that is said.
    """
    loaded = session.get_providers()
    if choice.chain[0] in loaded:
        return choice
    name = next(name for name, long_name in PROVIDERS.items() if long_name == loaded[0])
    reason = f"{choice.chain[0]} could not be loaded: its libraries or its device are missing."
    return Choice(name, tuple(loaded), reason)
