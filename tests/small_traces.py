"""Traces of the experts that a model used, small enough to read."""

import numpy as np

from edgeinfer.experts.trace import Trace


def small_trace(**changes) -> Trace:
    """Three tokens, two layers of four experts, two used; the second layer of the last token uses one."""
    routed = np.array([[[0, 1], [3, 2]], [[1, 0], [2, 0]], [[3, 1], [1, -1]]], np.int16)
    values = {
        "model": "a model",
        "architecture": "olmoe",
        "fingerprint": "ab" * 32,
        "num_experts": 4,
        "routed": routed,
        "decode": np.array([False, True, True]),
        "expert_bytes": np.array([1000, 3000], np.int64),
    }
    return Trace(**values | changes)
