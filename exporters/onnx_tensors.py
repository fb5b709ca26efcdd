"""The tensors and graphs of an ONNX model, wherever they are: in subgraphs, attributes and functions too."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

#: Types of which several elements share a byte -> bits of an element.
_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(TensorProto, name)
}


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of the tensor's data as `raw_data` holds it. ValueError for types without such a form: strings,
    unknown.
    """
    elements = prod(tensor.dims)
    if tensor.data_type in _PACKED_BITS:
        return (elements * _PACKED_BITS[tensor.data_type] + 7) // 8
    if tensor.data_type == TensorProto.STRING:
        raise ValueError("strings have no raw form")
    try:
        return elements * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise ValueError(f"unknown element type {tensor.data_type}") from None


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model holds or points to."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for default in function.attribute_proto:
            yield from _attribute_tensors(default)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterator[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for item in [*sparse, *attribute.sparse_tensors]:
        yield from (item.values, item.indices)
    graphs = [attribute.g] if attribute.HasField("g") else []
    for graph in [*graphs, *attribute.graphs]:
        yield from _graph_tensors(graph)
