"""Cross-layer gate: what the gate of layer l makes of the gate input of layer l-1 (Fate, arXiv 2502.12224).

The engine computes it while it records; here it is read from the trace.
"""

from __future__ import annotations

import numpy as np

from edgeinfer.experts.trace import Trace


class GatePredictor:
    def __init__(self, trace: Trace):
        self._predicted = trace.predicted
        self._none = np.full((trace.num_layers, 1), -1, np.int16)

    def rank(self, token: int, count: int) -> np.ndarray:
        return self._none if self._predicted is None else self._predicted[token, :, :count]
