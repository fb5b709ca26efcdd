"""Gates of mixture-of-experts layers: how evenly tokens choose experts.

A gate row's score for a token is close to normal, with a deviation that is the row's norm (the activations
are normed, and random). Rows of equal norm are chosen equally often. For skewed routing the norms differ such
that the expert of rank r is chosen about as often as 1 / (r + a): the first nearly half of the time, the last
hardly ever, and still by the token, not by a constant. No bias is needed, so it works for every architecture.
Which expert is popular differs from layer to layer.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from benchmarks.weights import RandomStream

# Share of the tokens; a normal score passes a positive threshold less than half of the time
MOST_POPULAR = 0.45


def popularity(experts: int, used: int, routing: str) -> np.ndarray:
    """Share of the tokens that choose the expert of each rank; the sum is `used`."""
    if routing == "spread" or used >= MOST_POPULAR * experts:
        return np.full(experts, used / experts)
    ranks = np.arange(experts)
    low, high = 1e-6, 1e6
    for _ in range(200):
        offset = (low * high) ** 0.5
        total = (MOST_POPULAR * offset / (ranks + offset)).sum()
        low, high = (offset, high) if total < used else (low, offset)
    return MOST_POPULAR * offset / (ranks + offset)


def gate_rows(stream: RandomStream, embedding: int, experts: int, used: int, routing: str) -> np.ndarray:
    """Gate weights, float32 [experts, embedding]."""
    shares = popularity(experts, used, routing)
    deviations = np.array([1 / NormalDist().inv_cdf(1 - min(share, MOST_POPULAR)) for share in shares])
    deviations /= np.sqrt(np.mean(deviations**2))
    order = np.argsort(stream.normal(experts), kind="stable")
    rows = stream.normal(experts * embedding).reshape(experts, embedding) / np.sqrt(embedding)
    return (rows * deviations[order, None]).astype(np.float32)
