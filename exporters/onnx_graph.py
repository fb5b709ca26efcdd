"""Changes to ONNX graphs that change nothing in what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from edgeinfer.onnx.nested import all_graphs, subgraphs

STANDARD = ("", "ai.onnx")


def standard_opset(model: ModelProto) -> int:
    """The version of the standard operators that the model is written for."""
    return next((opset.version for opset in model.opset_import if opset.domain in STANDARD), 1)


def lift_constants(graph: GraphProto) -> None:
    """Make the tensors of Constant nodes initializers, so that all weights are in one place."""
    outputs = {value.name for value in graph.output}
    kept = []
    for node in graph.node:
        tensor = _constant(node)
        if tensor is None or node.output[0] in outputs:
            kept.append(node)
            continue
        lifted = graph.initializer.add()
        lifted.CopyFrom(tensor)
        lifted.name = node.output[0]
    replace_nodes(graph, kept)


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or node.domain not in STANDARD or len(node.attribute) != 1:
        return None
    return node.attribute[0].t if node.attribute[0].name == "value" else None


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Let `graph` have these nodes, some of which it may have already."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def element_types(graph: GraphProto) -> dict[str, int]:
    """Name -> element type, where the graph says it (onnx.shape_inference adds what it can tell)."""
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {
        value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")
    }
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def fix_default_inputs(model: ModelProto) -> None:
    """Make weights that are inputs with a default (as old exporters wrote all of them) plain weights.

    Whole numbers that are used stay inputs: they are settings.
    """
    graph = model.graph
    settings = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    used = used_names(graph)
    fixed = {
        tensor.name
        for tensor in graph.initializer
        if model.ir_version < 4 or tensor.data_type not in settings or tensor.name not in used
    }
    kept = [value for value in graph.input if value.name not in fixed]
    if len(kept) < len(graph.input):
        _replace(graph.input, kept)
        model.ir_version = max(model.ir_version, 4)


def _replace(field, values: list[ValueInfoProto]) -> None:
    copies = [ValueInfoProto.FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)


def used_names(graph: GraphProto) -> set[str]:
    """Every name that a node, in whatever depth, or an output of a graph reads."""
    names: set[str] = set()
    for inner in all_graphs(graph):
        names.update(value.name for value in inner.output)
        for node in inner.node:
            names.update(node.input)
    return names


def rename_inputs(graph: GraphProto, renames: Mapping[str, str]) -> None:
    """Let the initializers, and the nodes that read them, in whatever depth, use other names."""
    for inner in all_graphs(graph):
        used = {tensor.name for tensor in inner.initializer}
        stale = used & set(renames.values())
        kept = [tensor for tensor in inner.initializer if tensor.name not in stale]
        if stale:
            copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del inner.initializer[:]
            inner.initializer.extend(copies)
        for tensor in inner.initializer:
            tensor.name = renames.get(tensor.name, tensor.name)
        for node in inner.node:
            for place, name in enumerate(node.input):
                if name in renames:
                    node.input[place] = renames[name]


def captured_names(node: NodeProto) -> set[str]:
    """What a node reads: its inputs, and what its bodies read from outside of them."""
    names = {name for name in node.input if name}
    for body in subgraphs(node):
        inside = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        wanted = {value.name for value in body.output}
        for inner in body.node:
            wanted |= captured_names(inner)
            inside.update(inner.output)
        names |= wanted - inside
    return names


def sort_nodes(graph: GraphProto) -> None:
    """Put the nodes, also those of subgraphs, in an order in which each comes after what it reads; stable."""
    for node in graph.node:
        for body in subgraphs(node):
            sort_nodes(body)
    order = _sorted(graph)
    if order != list(range(len(graph.node))):
        replace_nodes(graph, [graph.node[place] for place in order])


def _sorted(graph: GraphProto) -> list[int]:
    """Depth first from each node in turn, so that nodes move only as far as they must."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = [sorted({maker[name] for name in captured_names(node) if name in maker}) for node in graph.node]
    order: list[int] = []
    state = [0] * len(needs)  # 1: waits for what it needs, 2: placed
    for first in range(len(needs)):
        stack = [first]
        while stack:
            place = stack[-1]
            waiting = [need for need in needs[place] if state[need] == 0] if state[place] == 0 else []
            if state[place] == 0 and waiting:
                stack.extend(reversed(waiting))
                state[place] = 1
                continue
            stack.pop()
            if state[place] != 2:
                state[place] = 2
                order.append(place)
    return order


def initializers_in_order(graph: GraphProto) -> list[TensorProto]:
    """The initializers of `graph` and of all graphs in it, in the order in which the nodes first use them.

    Those that nothing uses are left out.
    """
    found: dict[int, TensorProto] = {}
    _collect(graph, {}, found)
    return list(found.values())


def _collect(graph: GraphProto, outer: Mapping[str, TensorProto], found: dict[int, TensorProto]) -> None:
    known = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for name in _reading_order(graph, known, found):
        if name in known:
            found.setdefault(id(known[name]), known[name])


def _reading_order(
    graph: GraphProto, known: Mapping[str, TensorProto], found: dict[int, TensorProto]
) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for body in subgraphs(node):
            _collect(body, known, found)
    for value in graph.output:
        yield value.name


def drop_unused_initializers(graph: GraphProto) -> None:
    used = used_names(graph)
    for inner in all_graphs(graph):
        kept = [tensor for tensor in inner.initializer if tensor.name in used]
        if len(kept) < len(inner.initializer):
            copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del inner.initializer[:]
            inner.initializer.extend(copies)


def drop_remarks(model: ModelProto) -> None:
    """Remove what says how and where the model was made (stack traces, paths) and what it does not need.

    The model's own key-value pairs stay: programs read them.
    """
    model.ClearField("doc_string")
    for graph in all_graphs(model.graph):
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
        for item in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")


def tidy_opsets(model: ModelProto) -> None:
    """Import the domains that nodes use, and no other, in a fixed order."""
    versions = {
        ("" if opset.domain in STANDARD else opset.domain): opset.version for opset in model.opset_import
    }
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    used = {"" if node.domain in STANDARD else node.domain for node in nodes} | {""}
    used |= {function.domain for function in model.functions}
    del model.opset_import[:]
    for domain in sorted(used):
        model.opset_import.add(domain=domain, version=versions.get(domain, 1))
