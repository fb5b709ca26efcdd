"""Architectures as data: how a checkpoint of transformers becomes what llama.cpp reads, one file each.

    gguf         llama.cpp's name of the architecture (several files may share one: llama, mistral, mixtral)
    classes      what config.json calls "architectures"
    model_types  its "model_type", where "architectures" is missing
    text_config  true where the language model's config may lie one level down
    defaults     config key -> what transformers takes where it is absent: a value, or "=EXPRESSION" of other
                 keys (also where it is null)
    require      what must hold because llama.cpp has nothing else: {"key", "values"}, {"equal" or "at_most":
                 [EXPRESSION, EXPRESSION]}, with "why", and "layers" or "other_layers" where it holds for that
                 number of layers, or for others
    metadata     GGUF key without the architecture's name -> a count (EXPRESSION), {"float": KEY}, also with
                 "null": what stands for null ("null": null leaves the key out), or {"sliding_layers":
                 EXPRESSION}: which layers slide, by layer_types or every one but each EXPRESSIONth
    rope         the fields of rope.RopeRules
    full_attention  true where llama.cpp knows no sliding window: a note says what that changes
    renames      beginning of a tensor's name -> what it stands for
    ignore       endings of the names of tensors that say nothing (constants that old versions saved)
    drop         beginnings of the names of tensors that are left out, which a note says (an image encoder)
    tensors      in the order in which llama.cpp uses them, {layer} and {expert} standing for numbers:
      name            GGUF name
      from            name in the checkpoint, or a list of alternatives; {expert}: one tensor an expert, which
                      are stacked; {"fused": NAME, "half": 0 or 1}: half of the rows (of each expert)
      shape           as PyTorch shows it, EXPRESSIONs; in GGUF too, unless "as" gives another
      permute_heads   EXPRESSION: so many heads, whose two halves are interleaved (llama.cpp's rope for llama)
      add             is added to each element
      type            "F32" for what is never stored in less; tensors of one dimension never are
      optional        true where it may be absent
      tied            where the output matrix is the token embedding: "omit" it, or "copy" token_embd.weight;
                      "only": omit it, and it is never another one

EXPRESSIONs are those of expressions.py over the config's keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.expressions import names_in
from edgeinfer.exporters.rope import RopeRules

FOLDER = Path(__file__).parent / "architectures"
_REQUIRE_KEYS = {"key", "values", "equal", "at_most", "why", "layers", "other_layers"}
_METADATA_KEYS = {"float", "null", "sliding_layers"}
_SOURCE_KEYS = {"fused", "half"}


@dataclass(frozen=True)
class Source:
    """One way in which a checkpoint may hold a tensor."""

    name: str
    half: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether each expert is a tensor of its own."""
        return "{expert}" in self.name


@dataclass(frozen=True)
class TensorRule:
    """How one GGUF tensor (of each layer) is made; the fields are explained above."""

    name: str
    sources: tuple[Source, ...]
    shape: tuple[str | int, ...]
    gguf_shape: tuple[str | int, ...]
    permute_heads: str | int | None = None
    add: float = 0.0
    type: str | None = None
    optional: bool = False
    tied: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True)
class ArchitectureMapping:
    """One file of architectures/."""

    name: str
    gguf: str
    classes: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    rope: RopeRules
    model_types: tuple[str, ...] = ()
    text_config: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    require: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    full_attention: bool = False
    renames: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


def mapping_names() -> list[str]:
    """The names of the known architectures."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_mapping(config: Mapping[str, Any]) -> ArchitectureMapping:
    """The mapping for a config; ExportError, which lists the known architectures, where there is none."""
    classes = config.get("architectures") or []
    model_type = config.get("model_type")
    every = [read_mapping(name) for name in mapping_names()]
    for mapping in every:
        if classes and isinstance(classes, list):
            if classes[0] in mapping.classes:
                return mapping
        elif model_type in mapping.model_types:
            return mapping
    found = classes[0] if classes and isinstance(classes, list) else f"model_type {model_type!r}"
    known = ", ".join(sorted(name for mapping in every for name in mapping.classes))
    raise ExportError(f"config.json: the architecture {str(found)[:80]} is unknown. Known are {known}.")


@cache
def read_mapping(name: str) -> ArchitectureMapping:
    """The mapping file of that name; ValueError for unknown keys and expressions that cannot be read."""
    return parse_mapping(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def parse_mapping(name: str, data: Mapping[str, Any]) -> ArchitectureMapping:
    """A mapping file's content, checked."""
    _known(name, data, {item.name for item in fields(ArchitectureMapping)} - {"name"})
    for rule in data.get("require", []):
        _known(f"{name}: require", rule, _REQUIRE_KEYS)
        _readable(*rule.get("equal", []), *rule.get("at_most", []), rule.get("key", 1))
    for key, value in data.get("metadata", {}).items():
        if isinstance(value, dict):
            _known(f"{name}: {key}", value, _METADATA_KEYS)
            _readable(*(value[kind] for kind in ("float", "sliding_layers") if kind in value))
        else:
            _readable(value)
    rope = data["rope"]
    _known(f"{name}: rope", rope, {item.name for item in fields(RopeRules)})
    simple = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return ArchitectureMapping(
        **{
            **simple,
            "name": name,
            "rope": RopeRules(**{**rope, "types": tuple(rope["types"])}),
            "tensors": tuple(_tensor_rule(name, tensor) for tensor in data["tensors"]),
        }
    )


_TENSOR_KEYS = {"name", "from", "shape", "as", "permute_heads", "add", "type", "optional", "tied"}


def _tensor_rule(where: str, data: Mapping[str, Any]) -> TensorRule:
    where = f"{where}: {data.get('name')}"
    _known(where, data, _TENSOR_KEYS)
    found = data["from"] if isinstance(data["from"], list) else [data["from"]]
    _readable(*data["shape"], *data.get("as", []), data.get("permute_heads", 1))
    if data.get("tied") not in (None, "omit", "copy", "only") or data.get("type") not in (None, "F32"):
        raise ValueError(f"{where}: 'tied' must be omit, copy or only, 'type' F32")
    return TensorRule(
        name=data["name"],
        sources=tuple(_source(where, source) for source in found),
        shape=tuple(data["shape"]),
        gguf_shape=tuple(data.get("as", data["shape"])),
        permute_heads=data.get("permute_heads"),
        add=float(data.get("add", 0)),
        type=data.get("type"),
        optional=bool(data.get("optional", False)),
        tied=data.get("tied"),
    )


def _source(where: str, data: str | Mapping[str, Any]) -> Source:
    if isinstance(data, str):
        return Source(data)
    _known(where, data, _SOURCE_KEYS)
    if data.get("half") not in (0, 1):
        raise ValueError(f"{where}: expected a half of 0 or 1, found {data.get('half')!r}")
    return Source(data["fused"], data["half"])


def _known(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(data) - known:
        raise ValueError(
            f"{where}: unknown keys {', '.join(sorted(unknown))}, expected {', '.join(sorted(known))}"
        )


def _readable(*expressions: str | int) -> None:
    for expression in expressions:
        names_in(expression)
