"""Weights that a stage does not read as a whole: tables of which it looks up rows, and what a rearranged
weight holds too.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import onnx

from edgeinfer.onnx.aligned_data import data_parts
from edgeinfer.onnx.cut import used_names
from edgeinfer.onnx.nested import subgraphs
from edgeinfer.onnx.optimize import all_tensors, external_range
from edgeinfer.onnx.stage_files import Table

#: Operators that look up rows: (domain, name) -> (input with the indices, inputs that are tables).
_LOOKUPS = {
    ("", "Gather"): (1, (0,)),
    ("com.microsoft", "EmbedLayerNormalization"): (0, (2,)),
}
_SMALL_TABLE_BYTES = 1 << 20


class WeightUses:
    """How the nodes of a stage's model, as ONNX Runtime has saved it, use its weights."""

    def __init__(self, model: onnx.ModelProto, ranges: Sequence[tuple[int, int]]):
        self._graph = model.graph
        self._ranges = dict(ranges)
        self._places = {tensor.name: external_range(tensor) for tensor in model.graph.initializer}
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self._rearranged = {tensor.name for tensor in model.graph.initializer if _is_rearranged(tensor)}
        self._outputs = {port.name for port in model.graph.output}
        self._inputs = {port.name for port in model.graph.input} - self._places.keys()

    def idle(self) -> tuple[int, ...]:
        """Offsets of ranges with one weight that is used only by operators that have another, rearranged one.

        So it is with the scales of weights in 4 bits: they are rearranged together with them. Nothing rests
        on it: such a range stays mapped, and is a weight like others once it was read.
        """
        needed = self._outputs | self._rearranged
        for node in self._graph.node:
            if not self._rearranged.intersection(node.input) or _has_subgraph(node):
                needed = needed.union(used_names(node))
        alone = (self._range_of(name) for name in self._places.keys() - needed)
        return tuple(sorted(offset for offset in alone if offset is not None))

    def tables(self) -> tuple[Table, ...]:
        """Large weights that are only looked up in, by integers that the stage is given."""
        users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self._graph.node:
            direct = {name: number for number, name in enumerate(node.input)}
            for name in used_names(node):
                users.setdefault(name, []).append((node, direct.get(name, -1)))
        found = []
        for name, place in self._places.items():
            if place is None or place[2] < _SMALL_TABLE_BYTES or name in self._outputs | self._rearranged:
                continue
            indices = {self._indices(node, number) for node, number in users.get(name, [])}
            if (
                len(indices) == 1
                and None not in indices
                and self._range_of(name) is not None
                and self._shapes[name]
            ):
                _, offset, nbytes = place
                found.append(Table(offset, nbytes, nbytes // self._shapes[name][0], indices.pop()))
        return tuple(found)

    def _indices(self, node: onnx.NodeProto, number: int) -> str | None:
        """The input of the stage by which `node` looks up rows of its input `number`; None: it does
        something else.
        """
        index_input, tables = _LOOKUPS.get((node.domain, node.op_type), (0, ()))
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if number not in tables or axis != 0 or _has_subgraph(node):
            return None
        makers = {output: maker for maker in self._graph.node for output in maker.output}
        name = node.input[index_input]
        while name in makers and _keeps_indices(makers[name]):
            name = makers[name].input[0]
        return name if name in self._inputs else None

    def _range_of(self, name: str) -> int | None:
        """The offset of the range that holds this weight and no other."""
        place = self._places[name]
        if place is None:
            return None
        start = place[1] // mmap.PAGESIZE * mmap.PAGESIZE
        end = start + self._ranges.get(start, 0)
        others = (other for key, other in self._places.items() if key != name and other is not None)
        shared = any(offset < end and start < offset + nbytes for _, offset, nbytes in others)
        return None if shared or place[1] + place[2] > end else start


def mapped_ranges(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """(offset, bytes) of whole pages for each weight in the data file, and for each part of a rearranged one."""
    tensors = (tensor for tensor in all_tensors(model.graph) if tensor.external_data)
    return [_whole_pages(*part) for tensor in tensors for part in data_parts(tensor)]


def _whole_pages(offset: int, nbytes: int) -> tuple[int, int]:
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-(offset + nbytes - start) // mmap.PAGESIZE) * mmap.PAGESIZE


def _is_rearranged(tensor: onnx.TensorProto) -> bool:
    return any(entry.key.startswith("prepacked") for entry in tensor.external_data)


def _keeps_indices(node: onnx.NodeProto) -> bool:
    """Whether indices are the same behind this node, or those outside 32 bits wrapped."""
    to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
    wide = to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    return node.op_type == "Identity" or (node.op_type == "Cast" and wide)


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(True for _ in subgraphs(node))
