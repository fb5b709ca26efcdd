"""Routing paths: tokens that took an expert go on to some experts more than to others (ExpertFlow).

Two tables are learned while running: how often each expert follows one of the layer before, and one of two
layers before. Old counts fade, so that the tables follow the text.
"""

from __future__ import annotations

import numpy as np

from edgeinfer.experts.trace import Trace

#: What one more token through an expert leaves of the shares that are known of it.
KEPT = 0.97
#: No share falls below this: what was never seen stays possible.
RAREST = 1e-3


class PathPredictor:
    def __init__(self, trace: Trace):
        self._routed = trace.routed
        experts, used = trace.num_experts, trace.num_used
        # [layer, expert there, expert `distance` layers on]: share of the tokens that went on so
        self._tables = [
            np.full((max(trace.num_layers - distance, 0), experts, experts), used / experts, np.float32)
            for distance in (1, 2)
        ]

    def rank(self, token: int, count: int) -> np.ndarray:
        if token > 0:
            self._learn(self._routed[token - 1])
        routed = self._routed[token]
        num_layers, experts = len(routed), self._tables[0].shape[1]
        # Each expert on the way speaks for itself: shares multiply, as if they did not depend on each other.
        likely = np.zeros((num_layers, experts), np.float32)
        for distance, table in enumerate(self._tables, start=1):
            if len(table):
                layers, taken = _pairs(routed[:-distance])
                np.add.at(likely, layers + distance, np.log(table[layers, taken]))
        ranked = np.argsort(-likely, axis=1, kind="stable")[:, :count]
        ranked[0] = -1  # there is no layer before
        return ranked

    def _learn(self, routed: np.ndarray) -> None:
        for distance, table in enumerate(self._tables, start=1):
            if len(table) == 0:
                continue
            layers, taken = _pairs(routed[:-distance])
            followed = np.zeros((len(table), table.shape[1]), np.float32)
            after_layers, after = _pairs(routed[distance:])
            followed[after_layers, after] = 1
            known = KEPT * table[layers, taken] + (1 - KEPT) * followed[layers]
            table[layers, taken] = np.maximum(known, RAREST)


def _pairs(routed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(layer, expert) of each that was used."""
    layers, slots = np.nonzero(routed >= 0)
    return layers, routed[layers, slots]
