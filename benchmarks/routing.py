"""Gates of mixture-of-experts layers: how evenly tokens choose experts.

A gate row's score for a token is close to normal, with a deviation that is the row's norm (the activations
are normed, and random). Rows of equal norm are chosen equally often. For skewed routing the norms differ such
that the expert of rank r is chosen about as often as 1 / (r + a): the first nearly half of the time, the last
hardly ever, and still by the token, not by a constant. No bias is needed, so it works for every architecture.
Which expert is popular differs from layer to layer.

How well a layer's experts can be told from the gate input of the layer before is another matter. Between two gates
lie the first layer's experts and the second one's attention; what they add to the residual stream turns the gate
input. In a "predictable" model they add less, so that the next gate given this layer's gate input finds about as many
of its experts as in trained models (recall 0.84 to 0.86 in every layer; 0.59 to 0.80 where they add what is usual).
"unpredictable" gives the norm before each gate random signs, so that the gate inputs of two layers have nothing in
common: recall is chance, used / experts. Both are spread.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from benchmarks.weights import RandomStream

ROUTINGS = ("spread", "skewed", "predictable", "unpredictable")
# What attention and experts of a predictable model add, as a part of what others do
PREDICTABLE_GAIN = 0.25
RESIDUAL_OUTPUTS = ("attn_output.weight", "ffn_down_exps.weight")
GATE_NORMS = ("ffn_norm.weight", "post_attention_norm.weight")  # behind them: the gate's input

# Share of the tokens; a normal score passes a positive threshold less than half of the time
MOST_POPULAR = 0.45


def popularity(experts: int, used: int, routing: str) -> np.ndarray:
    """Share of the tokens that choose the expert of each rank; the sum is `used`."""
    if routing != "skewed" or used >= MOST_POPULAR * experts:
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


def residual_gain(name: str, routing: str) -> float:
    """Factor of the weights of that name: below 1 for those that turn the residual stream, where it shall turn less."""
    return PREDICTABLE_GAIN if routing == "predictable" and name.endswith(RESIDUAL_OUTPUTS) else 1.0


def norm_weights(stream: RandomStream, name: str, length: int, routing: str) -> np.ndarray:
    """The weights of the norm of that name, float32 [length]: about 1, with random signs where routing has to turn."""
    weights = (1 + 0.1 * stream.normal(length)).astype(np.float32)
    if routing == "unpredictable" and name.endswith(GATE_NORMS):
        weights *= np.where(stream.normal(length) < 0, np.float32(-1), np.float32(1))
    return weights
