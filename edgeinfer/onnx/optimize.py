"""The graph that a stock session would run: ONNX Runtime's own optimizations, applied to the whole model
at once.

Cutting comes after this, so that each node of a stage is computed by the kernel that computes it in one
session.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from edgeinfer.errors import ModelFileError
from edgeinfer.onnx.graph import OnnxFile, read_onnx
from edgeinfer.onnx.nested import all_graphs
from edgeinfer.onnx.runtime import explained, make_session, session_options
from edgeinfer.onnx.tensors import TYPES

_FOLDER = "session.model_external_initializers_file_folder_path"


def optimize(file: OnnxFile, to: Path) -> onnx.ModelProto:
    """Optimize the model and write the result to `to`; gives it with the bytes of large tensors left in
    their files.

    Tensors that the optimizations made are in `to`, the others where they were. Raises ModelFileError where
    ONNX Runtime refuses the model.
    """
    options = without_weights(file.path.parent)
    options.optimized_model_filepath = os.fspath(to)
    with explained(file.path, ModelFileError):
        make_session(file.skeleton, options)
    model = onnx.ModelProto.FromString(read_onnx(to, data_of=file.path).skeleton)
    make_dense(model.graph)
    add_types(model, file, to.parent)
    return model


def as_it_is(file: OnnxFile, folder: Path) -> onnx.ModelProto:
    """The model without any optimization, its constants as weights; `folder` is for files that are there
    for a moment.
    """
    model = onnx.ModelProto.FromString(file.skeleton)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        constant = next((attribute for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and constant is not None:
            weight = model.graph.initializer.add()
            weight.CopyFrom(constant.t)
            weight.name = node.output[0]
        else:
            model.graph.node.append(node)
    make_dense(model.graph)
    add_types(model, file, folder)
    return model


def make_dense(model_graph: onnx.GraphProto) -> None:
    """Sparse weights become weights like others: ONNX Runtime cannot write sparse ones rearranged."""
    for graph in all_graphs(model_graph):
        for sparse in graph.sparse_initializer:
            values, indices = (onnx.numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
            dense = np.zeros(tuple(sparse.dims), values.dtype)
            where = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
            dense.reshape(-1)[where] = values
            graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
        del graph.sparse_initializer[:]


def without_weights(folder: Path) -> ort.SessionOptions:
    """Weights are mapped and, without prepacking, hardly touched."""
    options = session_options(1)
    options.add_session_config_entry(_FOLDER, os.fspath(folder))
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def add_types(model: onnx.ModelProto, file: OnnxFile, beside: Path) -> None:
    """State the type and shape of each tensor between two nodes, as ONNX Runtime infers them.

    Operators of ONNX Runtime's own are in the graph by now, which nothing else can infer. Large weights do
    not matter for that: files that are all holes stand in for them, as they may lie in two folders.
    """
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    known = {port.name for port in asked.graph.output}
    for node in asked.graph.node:
        for name in node.output:
            if name and name not in known:
                asked.graph.output.add(name=name)
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        _make_holes(asked.graph, Path(folder))
        options = without_weights(Path(folder))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with explained(file.path):
            session = make_session(asked.SerializeToString(), options)
            ports = [port for port in session.get_outputs() if port.name not in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(_value_info(port) for port in ports if port.type.startswith("tensor("))


def _make_holes(graph: onnx.GraphProto, folder: Path) -> None:
    ends: dict[str, int] = {}
    for tensor in all_tensors(graph):
        place = external_range(tensor)
        if place is not None:
            location, offset, nbytes = place
            ends[location] = max(offset + nbytes, ends.get(location, 0))
    for location, end in ends.items():
        path = folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(end)


def all_tensors(model_graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    """Every tensor in a graph and its subgraphs that holds or names data."""
    for graph in all_graphs(model_graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _value_info(port: ort.NodeArg) -> onnx.ValueInfoProto:
    """Sizes that vary are left open. So is the rank where it is 0: the same is said of tensors of unknown
    rank.
    """
    names = {"float": "FLOAT", "double": "DOUBLE"}
    kind = port.type.removeprefix("tensor(").removesuffix(")")
    info = onnx.ValueInfoProto(name=port.name)
    info.type.tensor_type.elem_type = onnx.TensorProto.DataType.Value(names.get(kind, kind.upper()))
    for size in port.shape or ():
        dim = info.type.tensor_type.shape.dim.add()
        if isinstance(size, int) and size >= 0:
            dim.dim_value = size
    return info


def external_range(tensor: onnx.TensorProto) -> tuple[str, int, int] | None:
    """(file, offset, bytes) of a tensor whose data is external; None for others."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_location != onnx.TensorProto.EXTERNAL or "location" not in entries:
        return None
    return entries["location"], int(entries.get("offset", 0)), weight_bytes(tensor)


def weight_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements; 0 for texts."""
    _, bits = TYPES.get(tensor.data_type, ("", 0))
    return -(-math.prod(tensor.dims) * bits // 8)


def take_in(model: onnx.ModelProto, path: Path) -> None:
    """Put the bytes of tensors that lie in the file `path` into the model itself."""
    for tensor in all_tensors(model.graph):
        place = external_range(tensor)
        if place is not None and place[0] == path.name:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            with open(path, "rb") as file:
                file.seek(place[1])
                tensor.raw_data = file.read(place[2])
