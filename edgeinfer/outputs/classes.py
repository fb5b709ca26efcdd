"""The most probable classes of an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeinfer.onnx.ports import Port
from edgeinfer.outputs.labels import Labels, label_of


@dataclass(frozen=True)
class Scored:
    """A class and its probability."""

    number: int
    label: str
    score: float


def looks_like_classes(ports: Sequence[Port]) -> bool:
    """Whether a model has the one output [batch, classes] of a classifier."""
    if len(ports) != 1 or ports[0].dtype.kind != "f" or len(ports[0].shape) != 2:
        return False
    count = ports[0].shape[1]
    return isinstance(count, int) and count > 1


def probabilities(scores: np.ndarray, activation: str | None) -> np.ndarray:
    """`scores` [classes] as probabilities; `activation` None: softmax, unless they are probabilities
    already."""
    scores = scores.astype(np.float64)
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    if activation == "none" or (activation is None and _sums_to_one(scores)):
        return scores
    if not np.isfinite(scores).all():  # what is broken stays visible: it has no probabilities
        return np.full_like(scores, np.nan)
    powers = np.exp(scores - scores.max(initial=0.0))
    return powers / powers.sum()


def _sums_to_one(scores: np.ndarray) -> bool:
    return bool(np.all(scores >= 0) and np.all(scores <= 1) and abs(scores.sum() - 1) < 1e-3)


def top_classes(
    scores: np.ndarray, labels: Labels | None, count: int, activation: str | None = None
) -> list[list[Scored]]:
    """The `count` most probable classes of each row of `scores` [.., classes], the first one first."""
    rows = scores.reshape(-1, scores.shape[-1])
    found = []
    for row in rows:
        shares = probabilities(row, activation)
        order = np.argsort(-shares, kind="stable")[:count]
        found.append(
            [Scored(int(number), label_of(labels, int(number)), float(shares[number])) for number in order]
        )
    return found
