"""A model's weights made smaller, one operator after the other, so that only one weight is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgeinfer.errors import ExportError
from edgeinfer.exporters import onnx_dynamic, onnx_nbits
from edgeinfer.exporters.onnx_graph import STANDARD, element_types, replace_nodes
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_tensors import all_graphs, subgraphs, tensor_bytes
from edgeinfer.exporters.onnx_weights import Inline, Source, raw_bytes

#: Smaller weights stay: they gain nothing, for each weight begins a page.
SMALLEST_BYTES = 4096
_LARGEST_BYTES = 1 << 30  # the quantizer of onnxruntime passes weights through files that protobuf must hold


@dataclass(frozen=True)
class Replacement:
    nodes: list[NodeProto]
    tensors: list[tuple[TensorProto, Source]]


@dataclass(frozen=True)
class Operator:
    """A node with its weights: `weights[i]` is the tensor of input i where that is one; `types` of all names."""

    node: NodeProto
    weights: Mapping[int, TensorProto]
    types: Mapping[str, int]


def quantize_int8(graph: OnnxGraph, scratch: Scratch, progress: Callable[[float], None] | None = None) -> int:
    """Compute the operators of onnx_dynamic in 8 bits; how many were changed. ExportError where there is
    none.
    """

    def replace(operator: Operator) -> Replacement | None:
        needed = onnx_dynamic.OPERATORS.get(_kind(operator.node), ())
        sizes = [tensor_bytes(tensor) for tensor in _floats(operator, needed)]
        if (
            not needed
            or len(sizes) < len(needed)
            or max(sizes) < SMALLEST_BYTES
            or max(sizes) > _LARGEST_BYTES
        ):
            return None
        nodes, tensors = onnx_dynamic.quantize_operator(_model_of(operator, graph))
        if any(node.op_type == operator.node.op_type and node.input == operator.node.input for node in nodes):
            return None  # the quantizer left it as it was
        return Replacement(nodes, [(tensor, Inline(raw_bytes(tensor))) for tensor in tensors])

    return _changed(
        _Rewriter(graph, scratch, replace, progress).run(), "INT8", "matrix products, LSTMs or embeddings"
    )


def quantize_int4(graph: OnnxGraph, scratch: Scratch, progress: Callable[[float], None] | None = None) -> int:
    """Keep the weights of matrix products in 4 bits; how many were changed. ExportError where there is none."""

    done: dict[tuple[int, bool], tuple[TensorProto, onnx_nbits.PackedMatrix]] = {}  # weights may be shared

    def replace(operator: Operator) -> Replacement | None:
        product = _product(operator)
        if product is None or tensor_bytes(product.weight) < SMALLEST_BYTES:
            return None
        key = (id(product.weight), product.transposed)
        if key not in done:
            array = graph.weights.array(product.weight)
            matrix = array.T if product.transposed else array
            name = product.weight.name
            done[key] = (
                product.weight,
                onnx_nbits.pack(name, matrix.shape, lambda a, b: matrix[:, a:b], onnx_nbits.INT4, scratch),
            )
        packed = done[key][1]
        result = operator.node.output[0]
        between = f"{result}_product" if product.bias else result
        nodes = [packed.node(operator.node.name, operator.node.input[0], between)]
        if product.bias:
            nodes.append(helper.make_node("Add", [between, product.bias], [result]))
        return Replacement(nodes, list(packed.tensors))

    return _changed(_Rewriter(graph, scratch, replace, progress).run(), "INT4", "matrix products")


def _changed(count: int, name: str, what: str) -> int:
    if count == 0:
        raise ExportError(
            f"{name} quantizes the weights of {what}, and this model has none of {SMALLEST_BYTES:,} bytes "
            "and more. Expected another --quant: INT8_STATIC (with --calibration) for convolutions, or F16."
        )
    return count


def _kind(node: NodeProto) -> tuple[str, str]:
    return ("" if node.domain in STANDARD else node.domain, node.op_type)


def _floats(operator: Operator, places: tuple[int, ...]) -> list[TensorProto]:
    found = [operator.weights.get(place) for place in places]
    return [tensor for tensor in found if tensor is not None and tensor.data_type == TensorProto.FLOAT]


@dataclass(frozen=True)
class _Product:
    weight: TensorProto
    transposed: bool
    bias: str


def _product(operator: Operator) -> _Product | None:
    """The node as a matrix product with a weight of two dimensions on the right, if that is what it is."""
    floats = _floats(operator, (1,))
    if not floats or len(floats[0].dims) != 2:
        return None
    if _kind(operator.node) == ("", "MatMul"):
        return _Product(floats[0], False, "")
    if _kind(operator.node) != ("", "Gemm"):
        return None
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in operator.node.attribute}
    if values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0 or values.get("transA", 0):
        return None
    inputs = operator.node.input
    return _Product(floats[0], bool(values.get("transB", 0)), inputs[2] if len(inputs) > 2 else "")


def _model_of(operator: Operator, graph: OnnxGraph) -> ModelProto:
    """A model of this one node, with its weights inside."""
    node = operator.node
    weights = []
    for tensor in operator.weights.values():
        weights.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
        weights[-1].raw_data = b"".join(graph.weights.source(tensor).pieces())
    known = {tensor.name for tensor in weights}
    inputs = [
        helper.make_tensor_value_info(name, operator.types.get(name, TensorProto.FLOAT), None)
        for name in dict.fromkeys(node.input)
        if name and name not in known
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output if name]
    body = helper.make_graph([node], "operator", inputs, outputs, weights)
    return helper.make_model(body, opset_imports=graph.proto.opset_import, ir_version=graph.proto.ir_version)


class _Rewriter:
    """Goes through all graphs and lets `replace` change what it wants."""

    def __init__(
        self,
        graph: OnnxGraph,
        scratch: Scratch,
        replace: Callable[[Operator], Replacement | None],
        progress: Callable[[float], None] | None,
    ):
        self._model = graph
        self._scratch = scratch
        self._replace = replace
        self._progress = progress
        self._graphs = list(all_graphs(graph.proto.graph))
        self._total = sum(len(inner.node) for inner in self._graphs)
        self._seen = 0
        self._changed = 0
        self._names = {name for inner in self._graphs for node in inner.node for name in node.output}
        self._names |= {tensor.name for inner in self._graphs for tensor in inner.initializer}

    def run(self) -> int:
        """How many nodes were replaced."""
        inferred = onnx.shape_inference.infer_shapes(self._model.proto)
        kinds = iter([element_types(inner) for inner in all_graphs(inferred.graph)])
        self._run(self._model.proto.graph, {}, {}, kinds)
        if self._changed:
            domains = {opset.domain for opset in self._model.proto.opset_import}
            if onnx_nbits.DOMAIN not in domains:
                self._model.proto.opset_import.add(domain=onnx_nbits.DOMAIN, version=1)
        return self._changed

    def _run(
        self,
        graph: GraphProto,
        outer: Mapping[str, TensorProto],
        outer_types: Mapping[str, int],
        kinds: Iterator[dict[str, int]],
    ) -> None:
        weights = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
        for value in graph.input:
            weights.pop(value.name, None)
        types = {**outer_types, **next(kinds)}
        nodes: list[NodeProto] = []
        shared: dict[tuple, str] = {}
        for node in graph.node:
            for body in subgraphs(node):
                self._run(body, weights, types, kinds)
            found = {place: weights[name] for place, name in enumerate(node.input) if name in weights}
            replacement = self._replace(Operator(node, found, types)) if found else None
            if replacement is None:
                nodes.append(node)
            else:
                self._changed += 1
                nodes += self._adopt(graph, node, replacement, shared)
            self._report()
        replace_nodes(graph, nodes)

    def _report(self) -> None:
        self._seen += 1
        if self._progress is not None:
            self._progress(self._seen / self._total)

    def _adopt(
        self, graph: GraphProto, old: NodeProto, new: Replacement, shared: dict[tuple, str]
    ) -> list[NodeProto]:
        """The nodes under names of their own. An activation that several operators use is quantized once."""
        names: dict[str, str] = {}
        for tensor, source in new.tensors:
            known = shared.get(("weight", tensor.name, source))
            names[tensor.name] = known or self._add_weight(graph, tensor, source)
            shared["weight", tensor.name, source] = names[tensor.name]
        nodes = []
        for node in new.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            key = (node.op_type, *node.input)
            if node.op_type == "DynamicQuantizeLinear" and key in shared:
                names.update(zip(node.output, shared[key]))
                continue
            for place, name in enumerate(node.output):
                if name and name not in old.output:
                    names[name] = node.output[place] = self._new_name(name)
            shared[key] = tuple(node.output)
            nodes.append(node)
        return nodes

    def _add_weight(self, graph: GraphProto, tensor: TensorProto, source: Source) -> str:
        added = graph.initializer.add(
            data_type=tensor.data_type, dims=tensor.dims, name=self._new_name(tensor.name)
        )
        if isinstance(source, Inline):
            source = self._scratch.add(np.frombuffer(source.data, np.uint8))
        self._model.weights.put(added, source)
        return added.name

    def _new_name(self, name: str) -> str:
        made, count = name, 2
        while made in self._names:
            made, count = f"{name}_{count}", count + 1
        self._names.add(made)
        return made
