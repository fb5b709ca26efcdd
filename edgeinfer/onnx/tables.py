"""Weights of which rows are looked up, as embeddings are: found, and kept out of ONNX Runtime's hands where a
stage is written.

ONNX Runtime holds a copy of each weight while it writes it. Nothing is rearranged in a table, so its bytes
can go from file to file, and a table may be larger than the memory there is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import onnx

from edgeinfer.onnx.aligned_data import copy_bytes
from edgeinfer.onnx.cut import used_names
from edgeinfer.onnx.nested import subgraphs
from edgeinfer.onnx.optimize import external_range

#: Operators that look up rows: (domain, name) -> (input with the indices, inputs that are tables).
_LOOKUPS = {
    ("", "Gather"): (1, (0,)),
    ("com.microsoft", "EmbedLayerNormalization"): (0, (2,)),
}
LARGE_BYTES = 64 << 20


def lookups(graph: onnx.GraphProto) -> dict[str, str]:
    """{weight: input of the graph with the indices} of those that are only looked up in, by integers that
    the graph is given.
    """
    inputs = {port.name for port in graph.input} - {tensor.name for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[str, set[str | None]] = {tensor.name: set() for tensor in graph.initializer if tensor.dims}
    for port in graph.output:
        found.get(port.name, set()).add(None)
    for node in graph.node:
        direct = {name: number for number, name in enumerate(node.input)}
        for name in found.keys() & set(used_names(node)):
            found[name].add(_indices(node, direct.get(name, -1), makers, inputs))
    alone = ((name, *indices) for name, indices in found.items() if len(indices) == 1)
    return {name: indices for name, indices in alone if indices is not None}


def _indices(
    node: onnx.NodeProto, number: int, makers: dict[str, onnx.NodeProto], inputs: set[str]
) -> str | None:
    """The input of the graph by which `node` looks up rows of its input `number`; None: it does something
    else.
    """
    index_input, tables = _LOOKUPS.get((node.domain, node.op_type), (0, ()))
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    if number not in tables or axis != 0 or has_subgraph(node):
        return None
    name = node.input[index_input]
    while name in makers and _keeps_indices(makers[name]):
        name = makers[name].input[0]
    return name if name in inputs else None


def _keeps_indices(node: onnx.NodeProto) -> bool:
    """Whether indices are the same behind this node, or those outside 32 bits wrapped."""
    to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
    wide = to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    return node.op_type == "Identity" or (node.op_type == "Cast" and wide)


def has_subgraph(node: onnx.NodeProto) -> bool:
    return any(True for _ in subgraphs(node))


def set_aside(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Make tables of LARGE_BYTES and more that lie in files inputs of the graph; gives them as they were."""
    names = lookups(graph).keys() - {port.name for port in graph.input}
    aside = []
    for tensor in graph.initializer:
        place = external_range(tensor)
        if tensor.name in names and place is not None and place[2] >= LARGE_BYTES:
            aside.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    for table in aside:
        _without(graph.initializer, table.name)
        graph.input.append(onnx.helper.make_tensor_value_info(table.name, table.data_type, table.dims))
    return aside


def put_back(aside: list[onnx.TensorProto], source: Path, model_path: Path, data_path: Path) -> None:
    """Make tables that were set aside weights of the model at `model_path` again; their bytes go from the
    files they name in `source` to the end of `data_path`.
    """
    if not aside:
        return
    model = onnx.load(model_path, load_external_data=False)
    with open(data_path, "ab") as data:
        for table in aside:
            location, offset, nbytes = external_range(table)
            start = -(-data.seek(0, os.SEEK_END) // mmap.PAGESIZE) * mmap.PAGESIZE
            data.truncate(start)
            with open(source / location, "rb") as file:
                file.seek(offset)
                copy_bytes(file, nbytes, data)
            del table.external_data[:]
            for key, value in (("location", data_path.name), ("offset", start), ("length", nbytes)):
                table.external_data.add(key=key, value=str(value))
            _without(model.graph.input, table.name)
            model.graph.initializer.append(table)
    model_path.write_bytes(model.SerializeToString())


def _without(values: MutableSequence[Any], name: str) -> None:
    for number, value in enumerate(values):
        if value.name == name:
            del values[number]
            return
