"""Weights that a stage does not read as a whole: tables of which it looks up rows, and what a rearranged
weight holds too.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import onnx

from edgeinfer.onnx.aligned_data import data_parts
from edgeinfer.onnx.cut import used_names
from edgeinfer.onnx.optimize import all_tensors, external_range
from edgeinfer.onnx.stage_files import Table
from edgeinfer.onnx.tables import has_subgraph, lookups

_SMALL_TABLE_BYTES = 1 << 20


class WeightUses:
    """How the nodes of a stage's model, as ONNX Runtime has saved it, use its weights."""

    def __init__(self, model: onnx.ModelProto, ranges: Sequence[tuple[int, int]]):
        self._graph = model.graph
        self._ranges = dict(ranges)
        self._places = {tensor.name: external_range(tensor) for tensor in model.graph.initializer}
        self._num_rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
        self._rearranged = {tensor.name for tensor in model.graph.initializer if _is_rearranged(tensor)}
        self._outputs = {port.name for port in model.graph.output}

    def idle(self) -> tuple[int, ...]:
        """Offsets of ranges with one weight that is used only by operators that have another, rearranged one.

        So it is with the scales of weights in 4 bits: they are rearranged together with them. Nothing rests
        on it: such a range stays mapped, and is a weight like others once it was read.
        """
        needed = self._outputs | self._rearranged
        for node in self._graph.node:
            if not self._rearranged.intersection(node.input) or has_subgraph(node):
                needed = needed.union(used_names(node))
        alone = (self._range_of(name) for name in self._places.keys() - needed)
        return tuple(sorted(offset for offset in alone if offset is not None))

    def tables(self) -> tuple[Table, ...]:
        """Large weights that are only looked up in, by integers that the stage is given."""
        found = []
        for name, indices in lookups(self._graph).items():
            place = self._places[name]
            if place is None or place[2] < _SMALL_TABLE_BYTES or name in self._rearranged:
                continue
            if self._range_of(name) is not None:
                _, offset, nbytes = place
                found.append(Table(offset, nbytes, nbytes // self._num_rows[name], indices))
        return tuple(found)

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
