"""Which tensors a GGUF file gets, and from which bytes of the checkpoint each is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.checkpoint import Checkpoint
from edgeinfer.exporters.expressions import count
from edgeinfer.exporters.mapping import ArchitectureMapping, Source, TensorRule
from edgeinfer.exporters.safetensors_file import TensorRecord
from edgeinfer.exporters.same_values import same_values

FLOATS = ("F64", "F32", "F16", "BF16")
EMBEDDING = "token_embd.weight"
_SHOWN = 6


@dataclass(frozen=True)
class Piece:
    """`num_elements` elements of a checkpoint's tensor from element `first` on."""

    record: TensorRecord
    first: int
    num_elements: int


@dataclass(frozen=True)
class PlannedTensor:
    """One GGUF tensor: `shape` as PyTorch shows it (slowest first), made of `pieces` in a row, or of
    `values`.

    `permute_heads`: the rows are so many heads, the two halves of each are interleaved. `add` is added to
    each element. `keep_float`: stays float32 whatever the model's type.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    permute_heads: int | None = None
    add: float = 0.0
    keep_float: bool = False
    values: np.ndarray | None = None

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TensorPlan:
    """All tensors in the order of their use; `dropped`: how many of the checkpoint's are left out. `untied`:
    config.json ties the output matrix to the token embedding, but the checkpoint holds another one.
    """

    tensors: tuple[PlannedTensor, ...]
    dropped: int
    untied: bool = False


def plan_tensors(
    mapping: ArchitectureMapping,
    checkpoint: Checkpoint,
    values: Mapping[str, Any],
    made: Mapping[str, np.ndarray],
) -> TensorPlan:
    """Match the checkpoint's tensors with the mapping; `made` are tensors that follow from the config (rope).

    Raises ExportError that names what is missing or left over, and what has another shape or no float dtype.
    """
    records = _renamed(mapping, checkpoint.tensors)
    matcher = _Matcher(records, values)
    tensors = [
        tensor for rule, layer in _each_rule(mapping, matcher) for tensor in matcher.match(rule, layer)
    ]
    matcher.check(mapping)
    tensors[1:1] = [
        PlannedTensor(name, array.shape, keep_float=True, values=array) for name, array in made.items()
    ]
    return TensorPlan(tuple(tensors), len(checkpoint.tensors) - len(records), matcher.untied)


def _renamed(mapping: ArchitectureMapping, records: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The tensors that count, by the names that the mapping uses."""
    renamed: dict[str, TensorRecord] = {}
    for name, record in records.items():
        if name.startswith(mapping.drop):
            continue
        for begin, stands_for in mapping.renames.items():
            if name.startswith(begin):
                name = stands_for + name.removeprefix(begin)
                break
        if name in renamed:
            raise ExportError(
                f"{record.path}: tensors {renamed[name].name!r} and {record.name!r} mean the same."
            )
        renamed[name] = record
    return renamed


def _each_rule(mapping: ArchitectureMapping, matcher: _Matcher) -> Iterator[tuple[TensorRule, int | None]]:
    """The rules in file order; those of a layer are repeated together for each layer."""
    rules, place = mapping.tensors, 0
    while place < len(rules):
        if not rules[place].per_layer:
            yield rules[place], None
            place += 1
            continue
        end = place
        while end < len(rules) and rules[end].per_layer:
            end += 1
        for layer in range(matcher.bounded("num_hidden_layers")):
            for rule in rules[place:end]:
                yield rule, layer
        place = end


class _Matcher:
    """Finds the tensors that rules ask for, and remembers what was missing and what nobody asked for."""

    def __init__(self, records: Mapping[str, TensorRecord], values: Mapping[str, Any]):
        self._records = records
        self._values = values
        self._left = dict(records)
        self._missing: list[str] = []
        self._tied = bool(values.get("tie_word_embeddings"))
        self._embedding: PlannedTensor | None = None
        self.untied = False

    def bounded(self, expression: str | int) -> int:
        """A count of layers or experts, each of which has a tensor at least."""
        number = count(expression, self._values)
        if number > len(self._records):
            raise ExportError(
                f"config.json: {expression} is {number:,}, but the checkpoint has only "
                f"{len(self._records):,} tensors."
            )
        return number

    def match(self, rule: TensorRule, layer: int | None) -> Iterator[PlannedTensor]:
        """The tensor that `rule` asks for, or none where it is absent."""
        if rule.tied and self._tied and not self._holds_another(rule):
            yield from self._tied_output(rule)
            return
        names = {} if layer is None else {"layer": str(layer)}
        shape = self._shape(rule.shape)
        source = next((source for source in rule.sources if self._has(source, names)), None)
        if source is None:
            if not rule.optional:
                self._missing.append(_filled(rule.sources[0].name, {**names, "expert": "0"}))
            return
        heads = rule.permute_heads
        tensor = PlannedTensor(
            name=_filled(rule.name, names),
            shape=self._shape(rule.gguf_shape),
            pieces=tuple(self._pieces(source, names, shape, rule)),
            permute_heads=None if heads is None else count(heads, self._values),
            add=rule.add,
            keep_float=rule.type == "F32" or len(rule.gguf_shape) == 1,
        )
        if tensor.name == EMBEDDING:
            self._embedding = tensor
        yield tensor

    def _holds_another(self, rule: TensorRule) -> bool:
        """Whether the checkpoint has an output matrix of its own, which then counts, as in transformers 5."""
        own = (self._records[source.name] for source in rule.sources if self._has(source, {}))
        stored = next(own, None)
        if stored is None or self._embedding is None:
            return False
        self.untied = not same_values(stored, self._embedding.pieces[0].record)
        if self.untied and rule.tied == "only":
            raise ExportError(
                f"{stored.path}: tensor {stored.name!r} is not the token embedding, to which config.json ties "
                "it; llama.cpp has no other output matrix in this architecture."
            )
        return self.untied

    def _tied_output(self, rule: TensorRule) -> Iterator[PlannedTensor]:
        for source in rule.sources:
            self._left.pop(source.name, None)
        if rule.tied == "copy" and self._embedding:
            yield PlannedTensor(rule.name, self._embedding.shape, self._embedding.pieces)

    def _shape(self, expressions: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(count(length, self._values) for length in expressions)

    def _has(self, source: Source, names: Mapping[str, str]) -> bool:
        return _filled(source.name, {**names, "expert": "0"}) in self._records

    def _pieces(
        self, source: Source, names: Mapping[str, str], shape: tuple[int, ...], rule: TensorRule
    ) -> Iterator[Piece]:
        if source.stacked:
            for expert in range(self.bounded(rule.shape[0])):
                name = _filled(source.name, {**names, "expert": str(expert)})
                yield from self._whole(name, shape[1:])
            return
        name = _filled(source.name, names)
        if source.half is None:
            yield from self._whole(name, shape)
            return
        size = shape[-2] * shape[-1]
        for piece in self._whole(name, (*shape[:-2], 2 * shape[-2], shape[-1])):
            for block in range(prod(shape[:-2])):
                yield Piece(piece.record, (2 * block + source.half) * size, size)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        record = self._records.get(name)
        self._left.pop(name, None)
        if record is None:
            self._missing.append(name)
            return
        where = f"{record.path}: tensor {record.name!r}"
        if record.shape != shape:
            raise ExportError(
                f"{where}: expected shape {list(shape)} by config.json, found {list(record.shape)}. The "
                "weights and the config do not belong together."
            )
        if record.dtype not in FLOATS:
            raise ExportError(
                f"{where}: expected one of {', '.join(FLOATS)}, found {record.dtype}. Export the original "
                "checkpoint, not a quantized one."
            )
        yield Piece(record, 0, record.num_elements)

    def check(self, mapping: ArchitectureMapping) -> None:
        """ExportError for all that is missing and all that is left over."""
        left = [record.name for name, record in self._left.items() if not name.endswith(mapping.ignore)]
        faults = []
        if self._missing:
            faults.append(f"{_tensors(self._missing)} missing: {_list(self._missing)}")
        if left:
            faults.append(f"{_tensors(left)} without a place in llama.cpp's {mapping.gguf}: {_list(left)}")
        if faults:
            raise ExportError(
                f"The checkpoint is not what config.json says (read as {mapping.name}). {'; '.join(faults)}."
            )


def _filled(pattern: str, names: Mapping[str, str]) -> str:
    for key, value in names.items():
        pattern = pattern.replace(f"{{{key}}}", value)
    return pattern


def _tensors(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    # the names are somebody else's: none may write control characters to the terminal
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:_SHOWN]) + more
