"""Architectures as data: the tensors and metadata that llama.cpp requires, one file each in architectures/.

    architecture  llama.cpp's name (several files may share one: a dense llama and Mixtral)
    tied          true where the output matrix is the token embedding
    defaults      dimensions beyond the common ones (or other values for them): numbers or expressions
    metadata      key without the architecture prefix -> number, true/false, dimension expression, or
                  {"string": text}
    tensors       name ("blk.{layer}." is repeated for every layer), shape in ggml order (a row's length
                  first); if need be kind, type (instead of the model's), layers ([first, end) as
                  expressions) and gain (a factor on the usual standard deviation)

An expression is a sum of products of dimensions and numbers: "heads*head_size+2*kv_heads*head_size".
Attention outputs have a gain of 0.5: attention averages over random tokens, which leaves what they have in
common; at full strength this grows from layer to layer until every token chooses the same experts.
Kinds: matrix (the default), embedding, output, expert_output, gate, norm, bias.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

from benchmarks.weights import BLOCKS, row_bytes

FOLDER = Path(__file__).parent / "architectures"
_TOP_KEYS = {"architecture", "tied", "defaults", "metadata", "tensors"}
_TENSOR_KEYS = {"name", "shape", "kind", "type", "layers", "gain"}
KINDS = ("matrix", "embedding", "output", "expert_output", "gate", "norm", "bias")
_FLOAT_KINDS = ("gate", "norm", "bias")

# Dimensions that every model has; the others have defaults
REQUIRED = ("layers", "embedding", "ffn", "heads", "vocabulary")
COMMON_DEFAULTS: dict[str, object] = {
    "kv_heads": "heads",
    "context": 4096,
    "experts": 0,
    "experts_used": 0,
}
COMMON_METADATA: dict[str, object] = {
    "block_count": "layers",
    "context_length": "context",
    "embedding_length": "embedding",
    "feed_forward_length": "ffn",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_size",
    "attention.value_length": "head_size",
    "vocab_size": "vocabulary",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to be made. `shape` is in ggml order; `gain` multiplies the usual standard deviation."""

    name: str
    type: str
    shape: tuple[int, ...]
    kind: str
    gain: float

    @property
    def num_rows(self) -> int:
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return row_bytes(self.type, self.shape[0]) * self.num_rows


def evaluate(expression: object, dimensions: dict[str, int]) -> int:
    """The value of a sum of products; KeyError with the unknown dimension's name."""
    if isinstance(expression, int):
        return expression
    return sum(
        prod(int(factor) if factor.isdigit() else dimensions[factor] for factor in term.split("*"))
        for term in str(expression).split("+")
    )


@dataclass(frozen=True)
class Architecture:
    name: str
    architecture: str
    tensors: tuple[dict, ...]
    metadata: dict[str, object]
    defaults: dict[str, object]
    tied: bool = False

    @property
    def has_experts(self) -> bool:
        return any(spec.get("kind") == "gate" for spec in self.tensors)

    def resolve(self, dimensions: dict[str, int]) -> dict[str, int]:
        """All dimensions, from the given ones and the defaults. Given ones win."""
        defaults = {**COMMON_DEFAULTS, **self.defaults}
        known = {*REQUIRED, *defaults, "head_size"}
        if unknown := set(dimensions) - known:
            raise ValueError(
                f"expected dimensions out of {', '.join(sorted(known))} for {self.name}, "
                f"found {', '.join(sorted(unknown))}"
            )
        if dimensions.get("experts") and not self.has_experts:
            raise ValueError(
                f"expected no experts for {self.name}, which is dense; mixtral is a llama with experts"
            )
        resolved = dict(dimensions)
        if "head_size" not in defaults and "head_size" not in resolved:
            resolved["head_size"] = resolved["embedding"] // resolved["heads"]
        for name, expression in defaults.items():
            resolved.setdefault(name, evaluate(expression, resolved))
        return resolved

    def metadata_values(self, dimensions: dict[str, int]) -> dict[str, int | float | bool | str]:
        """Full metadata keys and their values; `dimensions` are resolved ones."""
        values: dict[str, int | float | bool | str] = {}
        for key, value in {**COMMON_METADATA, **self.metadata}.items():
            if isinstance(value, dict):
                value = value["string"]
            elif isinstance(value, str):
                value = evaluate(value, dimensions)
            values[f"{self.architecture}.{key}"] = value
        return values

    def make_tensors(self, type: str, dimensions: dict[str, int], tied: bool | None = None) -> list[Tensor]:
        """Every tensor in file order, for resolved dimensions; `tied` None: as the architecture does."""
        tied = self.tied if tied is None else tied
        specs = [spec for spec in self.tensors if not (tied and spec.get("kind") == "output")]
        made = []
        for repeated, group in groupby(specs, key=lambda spec: "{layer}" in spec["name"]):
            members = list(group)
            if not repeated:
                made += [_make(spec, type, dimensions) for spec in members]
                continue
            for layer in range(dimensions["layers"]):
                present = [spec for spec in members if _is_in(spec, dimensions, layer)]
                made += [_make(spec, type, dimensions, layer) for spec in present]
        return made


def _is_in(spec: dict, dimensions: dict[str, int], layer: int) -> bool:
    first, end = spec.get("layers", (0, "layers"))
    return evaluate(first, dimensions) <= layer < evaluate(end, dimensions)


def _make(spec: dict, type: str, dimensions: dict[str, int], layer: int = 0) -> Tensor:
    shape = tuple(evaluate(length, dimensions) for length in spec["shape"])
    kind = spec.get("kind", "matrix")
    type = spec.get("type", "F32" if kind in _FLOAT_KINDS or len(shape) == 1 else type)
    if shape[0] % BLOCKS[type][0]:  # as llama.cpp's quantize does: a type with smaller blocks
        type = "Q8_0" if shape[0] % BLOCKS["Q8_0"][0] == 0 else "F16"
    return Tensor(spec["name"].replace("{layer}", str(layer)), type, shape, kind, float(spec.get("gain", 1)))


def architecture_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_architecture(name: str) -> Architecture:
    """The architecture file of that name; ValueError for an unknown name, key or kind."""
    if name not in architecture_names():
        raise ValueError(f"expected an architecture out of {', '.join(architecture_names())}, found '{name}'")
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    tensors = data["tensors"]
    unknown = set(data) - _TOP_KEYS
    unknown |= {key for spec in tensors for key in spec} - _TENSOR_KEYS
    unknown |= {spec["kind"] for spec in tensors if "kind" in spec} - set(KINDS)
    if unknown:
        raise ValueError(
            f"{name}.json: expected only known keys and kinds, found {', '.join(sorted(unknown))}"
        )
    return Architecture(
        name=name,
        architecture=data["architecture"],
        tensors=tuple(tensors),
        metadata=data.get("metadata", {}),
        defaults=data.get("defaults", {}),
        tied=data.get("tied", False),
    )
