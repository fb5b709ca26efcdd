"""What a predictor of the next layer's experts is, and how well each does on a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgeinfer.experts.gate import GatePredictor
from edgeinfer.experts.path import PathPredictor
from edgeinfer.experts.recurrence import RecurrencePredictor
from edgeinfer.experts.trace import Trace


class Predictor(Protocol):
    """Made with a trace. `rank` is called for tokens 0, 1, 2... in turn.

    It gives expert ids, int (layers, count), the likeliest first, -1 where there are no more. Row l may
    depend on the tokens before and on this token's layers before l: on what is known when layer l is about to
    be computed.
    """

    def __init__(self, trace: Trace): ...

    def rank(self, token: int, count: int) -> np.ndarray: ...


PREDICTORS: dict[str, type[Predictor]] = {
    "gate": GatePredictor,
    "path": PathPredictor,
    "recurrence": RecurrencePredictor,
}


@dataclass(frozen=True)
class Judgement:
    """How well the experts of decoded tokens were predicted, where there was a guess.

    k is the number of experts that a token uses. Precision is the share of the guesses that were used, recall
    the share of the used ones that were guessed; each for the first k and the first 2k guesses. `coverage` is
    the share of tokens and layers with a guess; `recall_by_layer` is for the first k, None where there was no
    guess.
    """

    coverage: float
    precision_k: float
    recall_k: float
    precision_2k: float
    recall_2k: float
    recall_by_layer: list[float | None]


def judge(trace: Trace, name: str) -> Judgement | None:
    """How well a predictor does; None where the trace does not allow a single guess."""
    predictor = PREDICTORS[name](trace)
    used = trace.num_used
    # [first k or 2k][layer]
    right, guessed, wanted = (np.zeros((2, trace.num_layers), np.int64) for _ in range(3))
    tried = 0
    for token in range(trace.num_tokens):
        ranked = predictor.rank(token, 2 * used)
        if not trace.decode[token]:
            continue
        routed = trace.routed[token]
        has_guess = (ranked >= 0).any(axis=1)
        tried += int(has_guess.sum())
        hit = ((ranked[:, :, None] == routed[:, None, :]) & (ranked >= 0)[:, :, None]).any(axis=2)
        for row, count in enumerate((used, 2 * used)):
            right[row] += hit[:, :count].sum(axis=1)
            guessed[row] += (ranked[:, :count] >= 0).sum(axis=1)
            wanted[row] += np.where(has_guess, (routed >= 0).sum(axis=1), 0)
    if tried == 0:
        return None
    precision = (right.sum(axis=1) / guessed.sum(axis=1)).tolist()
    recall = (right.sum(axis=1) / wanted.sum(axis=1)).tolist()
    by_layer = [r / w if w else None for r, w in zip(right[0].tolist(), wanted[0].tolist(), strict=True)]
    coverage = tried / (int(trace.decode.sum()) * trace.num_layers)
    return Judgement(coverage, precision[0], recall[0], precision[1], recall[1], by_layer)
