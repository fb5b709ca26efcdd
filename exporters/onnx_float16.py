"""A float32 model computed in float16, but for its inputs and outputs and what ONNX defines for float32 only.

Which inputs of an operator may be float16 is read from ONNX's own schema of it. Control flow passes float32
in and out; what is inside is converted. (onnxruntime.transformers.float16 puts casts for subgraphs into the
main graph, fails where two branches use one name, and needs all weights in memory.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, defs, helper

from edgeinfer.exporters.onnx_graph import (
    STANDARD,
    drop_unused_initializers,
    element_types,
    lift_constants,
    rename_inputs,
    replace_nodes,
    used_names,
)
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_weights import Computed, Inline, Source, Weights
from edgeinfer.onnx.nested import all_graphs, subgraphs

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_LARGEST, _SMALLEST = 65504.0, 2.0**-24  # of float16
#: Their scales lose too much, and the type of what they give is not always that of what they take.
_KEPT = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


def to_float16(graph: OnnxGraph) -> int:
    """Change the model in place. Gives the number of weights that became float16."""
    model = graph.proto
    for inner in all_graphs(model.graph):
        lift_constants(inner)
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = [element_types(inner) for inner in all_graphs(inferred.graph)]
    shared = _Shared(graph.weights, _opsets(model), iter(kinds), _all_names(model))
    _Scope(model.graph, shared, None).convert()
    used = used_names(model.graph)
    rename_inputs(model.graph, {new: old for old, new in shared.weights_made if old not in used})
    drop_unused_initializers(model.graph)
    return len(shared.weights_made)


def _opsets(model: ModelProto) -> dict[str, int]:
    return {"" if opset.domain in STANDARD else opset.domain: opset.version for opset in model.opset_import}


def _all_names(model: ModelProto) -> set[str]:
    names: set[str] = set()
    for graph in all_graphs(model.graph):
        names.update(value.name for value in graph.input)
        names.update(tensor.name for tensor in graph.initializer)
        names.update(name for node in graph.node for name in node.output)
    return names


@dataclass
class _Shared:
    """What all graphs of a model share. `kinds`: the types of each graph, in the order in which they are
    converted.
    """

    weights: Weights
    opsets: dict[str, int]
    kinds: Iterator[dict[str, int]]
    names: set[str]
    weights_made: list[tuple[str, str]] = field(default_factory=list)

    def new_name(self, name: str, ending: str) -> str:
        made, count = f"{name}_{ending}", 2
        while made in self.names:
            made, count = f"{name}_{ending}_{count}", count + 1
        self.names.add(made)
        return made

    def half_parameters(self, node: NodeProto) -> set[str]:
        """The type parameters of the operator that may be float16."""
        domain = "" if node.domain in STANDARD else node.domain
        if node.op_type in _KEPT or domain not in self.opsets or list(subgraphs(node)):
            return set()
        if not defs.has(node.op_type, self.opsets[domain], domain):
            return set()
        constraints = _schema(node, self.opsets).type_constraints
        if any(not kind.startswith("tensor(") for c in constraints for kind in c.allowed_type_strs):
            return set()  # sequences and such
        return {c.type_param_str for c in constraints if "tensor(float16)" in c.allowed_type_strs}


def _schema(node: NodeProto, opsets: dict[str, int]) -> defs.OpSchema:
    domain = "" if node.domain in STANDARD else node.domain
    return defs.get_schema(node.op_type, opsets[domain], domain)


def _parameters(formal: list[defs.OpSchema.FormalParameter], names: list[str]) -> list[str]:
    """The type parameter of each of the `names`; the last formal parameter may stand for many."""
    return [formal[min(place, len(formal) - 1)].type_str for place in range(len(names))]


class _Scope:
    """One graph while it is converted. `_versions`: (name, type) -> the name under which a value has that
    type.
    """

    def __init__(self, graph: GraphProto, shared: _Shared, parent: _Scope | None):
        self._graph = graph
        self._shared = shared
        self._parent = parent
        self._types = next(shared.kinds)
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._versions = {(value.name, FLOAT): value.name for value in graph.input}
        self._versions.update({(name, FLOAT): name for name in self._weights})
        self._nodes: list[NodeProto] = []
        self._outputs = {value.name for value in graph.output}

    def convert(self) -> None:
        for node in self._graph.node:
            self._convert_node(node)
        for value in self._graph.output:
            if self._type(value.name) == FLOAT:
                value.name = self._read(value.name, FLOAT, value.name)
        replace_nodes(self._graph, self._nodes)
        for value in self._graph.value_info:
            if self._versions.get((value.name, HALF)) == value.name:
                value.type.tensor_type.elem_type = HALF

    def _convert_node(self, node: NodeProto) -> None:
        half = self._half_of(node)
        if half:
            schema = _schema(node, self._shared.opsets)
            inputs = _parameters(schema.inputs, node.input)
            outputs = _parameters(schema.outputs, node.output)
        else:
            inputs, outputs = [""] * len(node.input), [""] * len(node.output)
        for place, name in enumerate(node.input):
            if self._type(name) == FLOAT:
                node.input[place] = self._read(name, HALF if inputs[place] in half else FLOAT)
        for body in subgraphs(node):
            _Scope(body, self._shared, self).convert()
        for place, name in enumerate(node.output):
            if name and self._type(name) == FLOAT:
                node.output[place] = self._write(name, HALF if outputs[place] in half else FLOAT)
        self._nodes.append(node)

    def _half_of(self, node: NodeProto) -> set[str]:
        """The type parameters that become float16: those of float inputs, all of whose types are known."""
        allowed = self._shared.half_parameters(node)
        if not allowed:
            return set()
        parameters = _parameters(_schema(node, self._shared.opsets).inputs, node.input)
        types: dict[str, set[int | None]] = {}
        for name, parameter in zip(node.input, parameters):
            if name:
                types.setdefault(parameter, set()).add(self._type(name))
        return {parameter for parameter in allowed if types.get(parameter) == {FLOAT}}

    def _type(self, name: str) -> int | None:
        """The element type that `name` had before."""
        if name in self._types or self._parent is None:
            return self._types.get(name)
        return self._parent._type(name)

    def _find(self, name: str, kind: int) -> str | None:
        found = self._versions.get((name, kind))
        return found or (self._parent._find(name, kind) if self._parent else None)

    def _read(self, name: str, kind: int, cast_name: str | None = None) -> str:
        """The name under which the float value `name` can be read as `kind`; a cast is made where needed."""
        found = self._find(name, kind)
        if found is None and kind == HALF:
            found = self._half_weight(name)
        if found is not None:
            return found
        other = self._find(name, HALF if kind == FLOAT else FLOAT)
        ending = "float32" if kind == FLOAT else "float16"
        made = cast_name if cast_name and other != cast_name else self._shared.new_name(name, ending)
        self._nodes.append(helper.make_node("Cast", [other or name], [made], name=f"{made}_cast", to=kind))
        self._versions[name, kind] = made
        return made

    def _write(self, name: str, kind: int) -> str:
        """The name for a node's output: outputs of a graph keep theirs for float32."""
        made = self._shared.new_name(name, "float16") if kind == HALF and name in self._outputs else name
        self._versions[name, kind] = made
        return made

    def _half_weight(self, name: str) -> str | None:
        """The weight `name`, as float16, added to the graph that it is in."""
        if name not in self._weights:
            return self._parent._half_weight(name) if self._parent and name not in self._types else None
        made = self._shared.new_name(name, "float16")
        old = self._weights[name]
        tensor = self._graph.initializer.add(name=made, data_type=HALF, dims=old.dims)
        source = _half_source(self._shared.weights.source(old))
        if isinstance(source, Inline):
            tensor.raw_data = source.data
        else:
            self._shared.weights.put(tensor, source)
        self._versions[name, HALF] = made
        self._shared.weights_made.append((name, made))
        return made


def _half_source(source: Source) -> Source:
    if isinstance(source, Inline):
        return Inline(half(np.frombuffer(source.data, np.float32)).tobytes())

    def pieces() -> Iterator[np.ndarray]:
        for piece in source.pieces():
            yield half(np.frombuffer(piece, np.float32))

    return Computed(source.num_bytes // 2, pieces, ("float16", source))


def half(array: np.ndarray) -> np.ndarray:
    """float16 in which what is finite stays finite, and what is not zero (an epsilon) not zero."""
    limited = np.where(np.isfinite(array), np.clip(array, -_LARGEST, _LARGEST), array)
    rounded = limited.astype(np.float16)
    lost = (rounded == 0) & (array != 0)
    rounded[lost] = np.copysign(np.float16(_SMALLEST), array[lost])
    return rounded
