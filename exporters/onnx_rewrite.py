"""Nodes of a model replaced one after the other, with new weights, in subgraphs too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto

from edgeinfer.exporters.onnx_graph import STANDARD, element_types, replace_nodes
from edgeinfer.exporters.onnx_nbits import DOMAIN
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_weights import Inline, Source
from edgeinfer.onnx.nested import all_graphs, subgraphs


@dataclass(frozen=True)
class Replacement:
    """Nodes that take the place of one, and the tensors that they need, without data, with their sources."""

    nodes: list[NodeProto]
    tensors: list[tuple[TensorProto, Source]]


@dataclass(frozen=True)
class Operator:
    """A node. `weights[i]`: the tensor of input i, where that is one; `types`: of all names."""

    node: NodeProto
    weights: Mapping[int, TensorProto]
    types: Mapping[str, int]

    @property
    def kind(self) -> tuple[str, str]:
        """(domain, name), the standard domain as ""."""
        return ("" if self.node.domain in STANDARD else self.node.domain, self.node.op_type)

    def float_weights(self, *places: int) -> list[TensorProto]:
        """The float32 weights among the inputs at `places`."""
        found = [self.weights.get(place) for place in places]
        return [tensor for tensor in found if tensor is not None and tensor.data_type == TensorProto.FLOAT]


@dataclass(frozen=True)
class _Made:
    """What was added to a graph: (name, source) of a weight -> its name; operator and inputs -> outputs of
    nodes that quantize activations.
    """

    weights: dict[tuple[str, Source], str]
    quantized: dict[tuple[str, ...], tuple[str, ...]]


class Rewriter:
    """Goes through all graphs of a model and lets `replace` change what it wants."""

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
        self._names |= {item.name for inner in self._graphs for item in (*inner.initializer, *inner.input)}

    def run(self) -> int:
        """How many nodes were replaced."""
        inferred = onnx.shape_inference.infer_shapes(self._model.proto)
        kinds = iter([element_types(inner) for inner in all_graphs(inferred.graph)])
        self._run(self._model.proto.graph, {}, {}, kinds)
        if self._changed:
            domains = {opset.domain for opset in self._model.proto.opset_import}
            if DOMAIN not in domains:
                self._model.proto.opset_import.add(domain=DOMAIN, version=1)
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
        made = _Made({}, {})
        for node in graph.node:
            for body in subgraphs(node):
                self._run(body, weights, types, kinds)
            found = {place: weights[name] for place, name in enumerate(node.input) if name in weights}
            replacement = self._replace(Operator(node, found, types)) if found else None
            if replacement is None:
                nodes.append(node)
            else:
                self._changed += 1
                nodes += self._adopt(graph, node, replacement, made)
            self._report()
        replace_nodes(graph, nodes)

    def _report(self) -> None:
        self._seen += 1
        if self._progress is not None:
            self._progress(self._seen / self._total)

    def _adopt(self, graph: GraphProto, old: NodeProto, new: Replacement, made: _Made) -> list[NodeProto]:
        """The nodes under names of their own. An activation that several operators use is quantized once."""
        names = {tensor.name: self._add_weight(graph, tensor, source, made) for tensor, source in new.tensors}
        nodes = []
        for node in new.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            key = (node.op_type, *node.input)
            if key in made.quantized:
                names.update(zip(node.output, made.quantized[key]))
                continue
            for place, name in enumerate(node.output):
                if name and name not in old.output:
                    names[name] = node.output[place] = self._new_name(name)
            if node.op_type == "DynamicQuantizeLinear":
                made.quantized[key] = tuple(node.output)
            nodes.append(node)
        return nodes

    def _add_weight(self, graph: GraphProto, tensor: TensorProto, source: Source, made: _Made) -> str:
        if isinstance(source, Inline):
            source = self._scratch.add(np.frombuffer(source.data, np.uint8))
        key = (tensor.name, source)
        if key not in made.weights:
            made.weights[key] = self._new_name(tensor.name)
            added = graph.initializer.add(
                name=made.weights[key], data_type=tensor.data_type, dims=tensor.dims
            )
            self._model.weights.put(added, source)
        return made.weights[key]

    def _new_name(self, name: str) -> str:
        made, count = name, 2
        while made in self._names:
            made, count = f"{name}_{count}", count + 1
        self._names.add(made)
        return made
