"""Where a graph may be cut into stages, and the model of each stage.

A cut lies between two nodes of the graph's order. What was computed before it and is used behind it is handed
over, so narrow places, where few tensors are, make good cuts. Weights are not handed over: each stage has
those that it uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgeinfer.onnx.nested import subgraphs

# Tensors handed over at a good cut: a residual stream is one; cosines, sines, lengths and masks are others,
# two of each in models with two kinds of layers.
NARROW = 8


@dataclass(frozen=True)
class Stage:
    """Nodes [first, last) of the graph. `inputs`, `outputs`: tensors it takes and gives, of the model's
    own or not.
    """

    first: int
    last: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph:
    """A model's graph in the order of its nodes, and what crosses each place between two of them."""

    def __init__(self, model: onnx.ModelProto):
        graph = model.graph
        self.model = model
        self.nodes = list(graph.node)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {info.name: info for info in [*graph.value_info, *graph.input, *graph.output]}
        # Inputs with a default value: a weight that a caller may replace, so it is no constant.
        self.defaults = {port.name for port in graph.input} & self.weights.keys()
        self.inputs = tuple(port.name for port in graph.input if port.name not in self.weights)
        self.outputs = tuple(port.name for port in graph.output)
        self._used = [used_names(node) for node in self.nodes]
        self._made = [[name for name in node.output if name] for node in self.nodes]
        self._crossing = self._find_crossing()

    def _find_crossing(self) -> list[int]:
        """How many tensors cross the place before each node; -1 where one has no type that a stage could
        state.
        """
        last_use = {name: number for number, used in enumerate(self._used) for name in used}
        change = [0] * (len(self.nodes) + 1)
        untyped = [0] * (len(self.nodes) + 1)
        for number, made in enumerate(self._made):
            for name in made:
                last = last_use.get(name, -1)
                if last > number:
                    tally = change if self._is_tensor(name) else untyped
                    tally[number + 1] += 1
                    tally[last + 1] -= 1
        counts, crossing, without = [], 0, 0
        for more, more_untyped in zip(change, untyped):
            crossing, without = crossing + more, without + more_untyped
            counts.append(-1 if without else crossing)
        return counts

    def _is_tensor(self, name: str) -> bool:
        info = self._types.get(name)
        return info is not None and info.type.HasField("tensor_type") and info.type.tensor_type.elem_type != 0

    def places(self, widest: int | None = NARROW) -> list[int]:
        """Numbers of nodes before which the graph may be cut, handing over at most `widest` tensors (None:
        any number).
        """
        return [
            number
            for number in range(1, len(self.nodes))
            if 0 <= self._crossing[number] and (widest is None or self._crossing[number] <= widest)
        ]

    def crossing(self, number: int) -> int:
        return self._crossing[number]

    def node_bytes(self, sizes: Mapping[str, int]) -> list[int]:
        """Bytes of the weights that each node uses; one that several use counts for the first."""
        seen: set[str] = set()
        result = []
        for used in self._used:
            new = [name for name in used if name in sizes and name not in seen]
            seen.update(new)
            result.append(sum(sizes[name] for name in new))
        return result

    def stages(self, cuts: Sequence[int]) -> list[Stage]:
        """The stages between `cuts`, which are numbers of nodes in rising order."""
        bounds = [0, *cuts, len(self.nodes)]
        made_in = {name: stage for stage, (first, last) in enumerate(zip(bounds, bounds[1:]))
                   for made in self._made[first:last] for name in made}  # fmt: skip
        stages, wanted = [], set(self.outputs)
        for number in reversed(range(len(bounds) - 1)):
            first, last = bounds[number], bounds[number + 1]
            used = {name for names in self._used[first:last] for name in names}
            outputs = [name for made in self._made[first:last] for name in made if name in wanted]
            if number == 0:  # weights that are outputs themselves
                outputs += [name for name in self.outputs if name in self.weights]
            taken = [name for name in self.inputs if name in used]
            taken += sorted(name for name in used if made_in.get(name, number) < number)
            if not outputs:  # what it computes is used nowhere
                continue
            wanted |= set(taken)
            stages.append(Stage(first, last, tuple(taken), tuple(outputs)))
        return stages[::-1]

    def stage_model(self, stage: Stage) -> onnx.ModelProto:
        """The model of one stage, with the graph's own weights, types and operator sets."""
        nodes = self.nodes[stage.first : stage.last]
        used = {name for names in self._used[stage.first : stage.last] for name in names} | set(stage.outputs)
        weights = [tensor for name, tensor in self.weights.items() if name in used]
        defaults = [tensor.name for tensor in weights if tensor.name in self.defaults]
        made = {name for names in self._made[stage.first : stage.last] for name in names}
        graph = onnx.helper.make_graph(
            nodes,
            self.model.graph.name or "stage",
            [self._port(name) for name in (*stage.inputs, *defaults)],
            [self._port(name) for name in stage.outputs],
            weights,
            value_info=[
                info for info in self.model.graph.value_info if info.name in made - set(stage.outputs)
            ],
        )
        model = onnx.ModelProto(ir_version=self.model.ir_version, graph=graph)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        return model

    def _port(self, name: str) -> onnx.ValueInfoProto:
        if name in self._types:
            return self._types[name]
        tensor = self.weights[name]
        return onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)


def used_names(node: onnx.NodeProto) -> list[str]:
    """Names of tensors that a node reads, those that its subgraphs take from around them too."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        names += _captured(graph)
    return list(dict.fromkeys(names))


def _captured(graph: onnx.GraphProto) -> Iterable[str]:
    """Names that a subgraph uses and does not define. A node may only use what comes before it."""
    defined = {port.name for port in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {tensor.values.name for tensor in graph.sparse_initializer}
    captured: list[str] = []
    for node in graph.node:
        captured += [name for name in used_names(node) if name not in defined]
        defined |= set(node.output)
    captured += [port.name for port in graph.output if port.name not in defined]
    return captured


def choose_cuts(
    graph: Graph, sizes: Mapping[str, int], stage_bytes: int, widest: int | None = NARROW
) -> list[int]:
    """Cuts at narrow places so that stages hold at most `stage_bytes` of weights, or one node that has more.

    A stage ends at the narrowest place among those where it holds from half to all of what it may; where
    there is none, at the last place before, or else the first one behind.
    """
    allowed = set(graph.places(widest))
    nbytes = graph.node_bytes(sizes)
    cuts: list[int] = []
    held, best, best_rank = 0, None, (True, 0)
    for number in range(len(nbytes)):
        if number in allowed and held > 0:
            half_empty = held < stage_bytes / 2
            rank = half_empty, 0 if half_empty else graph.crossing(number)
            if best is None or rank <= best_rank:
                best, best_rank = number, rank
        if best is not None and held + nbytes[number] > stage_bytes:
            cuts.append(best)
            held, best = sum(nbytes[best:number]), None
        held += nbytes[number]
    return cuts


def even_cuts(graph: Graph, count: int) -> list[int]:
    """`count` cuts, or as many as there are places, spread evenly over the nodes; wide places too."""
    places = graph.places(None)
    if count >= len(places):
        return places
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]
