"""Recurrence: the experts of the tokens before, the latest first. Text on one topic repeats them."""

from __future__ import annotations

import numpy as np

from edgeinfer.experts.trace import Trace


class RecurrencePredictor:
    def __init__(self, trace: Trace):
        self._routed = trace.routed
        self._last_use = np.full((trace.num_layers, trace.num_experts), -1)  # token

    def rank(self, token: int, count: int) -> np.ndarray:
        if token > 0:
            layer, slot = np.nonzero(self._routed[token - 1] >= 0)
            self._last_use[layer, self._routed[token - 1][layer, slot]] = token - 1
        ranked = np.argsort(-self._last_use, axis=1, kind="stable")[:, :count]
        return np.where(np.take_along_axis(self._last_use, ranked, axis=1) >= 0, ranked, -1)
