"""Graphs inside graphs: the bodies of an ONNX model's If, Loop and Scan nodes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, NodeProto


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of a control-flow node, in the order of its attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and every graph inside it, outer ones first."""
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from all_graphs(body)
