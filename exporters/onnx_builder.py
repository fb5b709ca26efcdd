"""An ONNX graph written node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_weights import Source, Weights


class Builder:
    """Nodes, weights and ports in the order in which they are added; values are known by their names."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._nodes: list[NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def op(self, kind: str, inputs: Sequence[str], result: str, domain: str = "", **attributes: Any) -> str:
        """Add a node whose output, and whose own name, is `result`."""
        return self.ops(kind, inputs, [result], domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], results: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        self.add(helper.make_node(kind, list(inputs), list(results), results[0], domain=domain, **attributes))
        return list(results)

    def add(self, node: NodeProto) -> None:
        self._nodes.append(node)

    def constant(self, name: str, value: Any, dtype: type) -> str:
        if name not in self._tensors:
            self._tensors[name] = numpy_helper.from_array(np.array(value, dtype), name)
        return name

    def weight(self, tensor: TensorProto, source: Source) -> str:
        """A weight by its name; one that is used twice is there once."""
        if tensor.name not in self._tensors:
            self._weights.put(tensor, source)
            self._tensors[tensor.name] = tensor
        return tensor.name

    def finish(
        self, name: str, opsets: dict[str, int], ir_version: int, metadata: dict[str, str]
    ) -> OnnxGraph:
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._tensors.values())
        )
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
        helper.set_model_props(model, metadata)
        return OnnxGraph(model, self._weights, self._weights.folder)
