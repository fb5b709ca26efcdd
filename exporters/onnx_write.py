"""An ONNX file and the file with its weights, laid out so that they can be streamed: page-aligned, in order
of use.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, defs

import edgeinfer
from edgeinfer.errors import ExportError
from edgeinfer.exporters.onnx_data_file import place, write_parts
from edgeinfer.exporters.onnx_graph import (
    STANDARD,
    drop_remarks,
    drop_unused_initializers,
    initializers_in_order,
    lift_constants,
    sort_nodes,
    tidy_opsets,
)
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_tensors import all_tensors, tensor_bytes
from edgeinfer.exporters.onnx_weights import Source, set_place
from edgeinfer.onnx.nested import all_graphs
from edgeinfer.onnx.runtime import explained, make_session, session_options

EXTERNAL_BYTES = 1024  # smaller tensors stay inside the model
DATA_SUFFIX = ".data"


@dataclass(frozen=True)
class Written:
    """Bytes of the model file and of the weights beside it (0: there are none), and how many tensors those
    are.
    """

    model_bytes: int
    data_bytes: int
    num_external: int


def write_onnx(graph: OnnxGraph, path: Path, progress: Callable[[float], None] | None = None) -> Written:
    """Write the model to `path` and its weights to the same name with ".data"; `graph` is used up.

    Every tensor of EXTERNAL_BYTES and more starts at a page (4096 bytes), in the order in which the nodes use
    them, equal ones once. The same model gives the same bytes.
    """
    model = graph.proto
    _finish(model)
    tensors = initializers_in_order(model.graph)
    large = _equal_ones_joined(model, [(t, graph.weights.source(t)) for t in tensors if _is_large(t)])
    data = path.with_name(path.name + DATA_SUFFIX)
    if large:
        parts = place([(tensor.name, source) for tensor, source in large])
        write_parts(data, parts, progress)
        offsets = {part.source: part.offset for part in parts}
        for tensor, source in large:
            set_place(tensor, data.name, offsets[source], source.num_bytes)
    outside = {id(tensor) for tensor, _ in large}
    for tensor in all_tensors(model):
        if id(tensor) not in outside and tensor.data_type != TensorProto.STRING:
            graph.weights.embed(tensor)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return Written(path.stat().st_size, data.stat().st_size if large else 0, len(large))


def _equal_ones_joined(
    model: ModelProto, large: list[tuple[TensorProto, Source]]
) -> list[tuple[TensorProto, Source]]:
    """The same, but weights of subgraphs (both branches of an If may have all of them) with equal data have one
    source.
    """
    outside = {id(tensor): tensor for tensor in model.graph.initializer}
    sizes = Counter(source.num_bytes for tensor, source in large if id(tensor) not in outside)
    first: dict[tuple[int, bytes], Source] = {}
    joined = []
    for tensor, source in large:
        if id(tensor) not in outside and sizes[source.num_bytes] > 1:
            digest = hashlib.blake2b(digest_size=32)
            for piece in source.pieces():
                digest.update(piece)
            source = first.setdefault((source.num_bytes, digest.digest()), source)
        joined.append((tensor, source))
    return joined


def _finish(model: ModelProto) -> None:
    for graph in all_graphs(model.graph):
        lift_constants(graph)
    drop_unused_initializers(model.graph)
    sort_nodes(model.graph)
    drop_remarks(model)
    tidy_opsets(model)
    for graph in all_graphs(model.graph):
        graph.value_info.sort(key=lambda value: value.name)
    tensors = initializers_in_order(model.graph)  # holds them, so that their ids stay theirs
    order = {id(tensor): place for place, tensor in enumerate(tensors)}
    for graph in all_graphs(model.graph):
        graph.initializer.sort(key=lambda tensor: order.get(id(tensor), len(order)))
    model.producer_name, model.producer_version = "edgeinfer", edgeinfer.__version__


def _is_large(tensor: TensorProto) -> bool:
    return tensor.data_type != TensorProto.STRING and tensor_bytes(tensor) >= EXTERNAL_BYTES


def check_written(path: Path, source: object) -> None:
    """That onnx finds no fault with the file and ONNX Runtime loads it. `source`: whose export it is, for
    errors.
    """
    if _only_known_operators(path):
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            reason = " ".join(str(error).split())[:600]
            raise ExportError(
                f"The export of {source} is not valid ONNX, so it was dropped: {reason}"
            ) from error
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    with explained(f"the export of {source}", ExportError):
        make_session(str(path), options)


def _only_known_operators(path: Path) -> bool:
    """ONNX Runtime has operators of its own in the standard domain, which onnx does not know."""
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    return all(node.domain not in STANDARD or defs.has(node.op_type) for node in nodes)
