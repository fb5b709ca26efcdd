"""Rotary positions of a decoder: the frequencies of transformers, and the nodes that turn by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.onnx_builder import Builder


@dataclass(frozen=True)
class Rope:
    """`frequencies`: float32 (half the rotated elements,), radians a position; `scale`: of cosine and sine.

    `long_frequencies` take their place where a sequence has more than `switch` tokens.
    """

    frequencies: np.ndarray
    scale: float
    long_frequencies: np.ndarray | None = None
    switch: int | None = None
    note: str | None = None

    @property
    def rotated(self) -> int:
        """Elements of a head that are turned."""
        return 2 * len(self.frequencies)


def read_rope(config: Any, layer_type: str | None = None) -> Rope:
    """The rope of a config of transformers. `layer_type`: where types of layers differ in it. ExportError:
    unknown.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: Mapping[str, Any] = config.rope_parameters
    nested = layer_type is not None and layer_type in parameters
    parameters = parameters[layer_type] if nested else parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return Rope(_default(config, parameters), 1.0)
    if kind not in ("linear", "llama3", "yarn", "longrope", "dynamic"):
        raise ExportError(
            f"config.json: the rope scaling {str(kind)[:40]!r} is unknown, expected linear, llama3, yarn, "
            "longrope or dynamic."
        )
    compute, extra = ROPE_INIT_FUNCTIONS[kind], {"layer_type": layer_type} if nested else {}
    found, scale = compute(config, "cpu", **extra)
    if kind != "longrope":
        limit = config.max_position_embeddings
        note = (
            f"beyond {limit:,} tokens rope is not scaled as transformers does" if kind == "dynamic" else None
        )
        return Rope(found.float().numpy(), float(scale), note=note)
    switch = parameters["original_max_position_embeddings"]
    long, _ = compute(config, "cpu", seq_len=switch + 1, **extra)
    return Rope(found.float().numpy(), float(scale), long.float().numpy(), switch)


def _default(config: Any, parameters: Mapping[str, Any]) -> np.ndarray:
    import torch  # its arithmetic, so that the frequencies are its own to the last bit

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(size * parameters.get("partial_rotary_factor", 1.0))
    return (1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size))).numpy()


def cos_and_sin(builder: Builder, rope: Rope, positions: str, name: str, kind: int) -> tuple[str, str]:
    """The names of cosine and sine (batch, sequence, half), of element type `kind`.

    `positions`: the name of the positions as float32, (batch, sequence, 1).
    """
    frequencies = builder.constant(f"{name}.inv_freq", rope.frequencies, np.float32)
    if rope.switch is not None:
        frequencies = _longer(builder, rope, positions, name, frequencies)
    angles = builder.op("Mul", [positions, frequencies], f"{name}.angles")
    results = []
    for function in ("Cos", "Sin"):
        found = builder.op(function, [angles], f"{name}.{function.lower()}")
        if rope.scale != 1.0:
            scale = builder.constant(f"{name}.scale", rope.scale, np.float32)
            found = builder.op("Mul", [found, scale], f"{found}.scaled")
        results.append(builder.op("Cast", [found], f"{found}.cast", to=kind))
    return results[0], results[1]


def _longer(builder: Builder, rope: Rope, positions: str, name: str, short: str) -> str:
    last = builder.op("ReduceMax", [positions], f"{name}.last_position", keepdims=0)
    limit = builder.constant(f"{name}.switch", rope.switch - 1, np.float32)
    is_long = builder.op("Greater", [last, limit], f"{name}.is_long")
    long = builder.constant(f"{name}.long_inv_freq", rope.long_frequencies, np.float32)
    return builder.op("Where", [is_long, long, short], f"{name}.chosen_inv_freq")
