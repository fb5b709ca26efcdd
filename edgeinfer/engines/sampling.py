"""The next token from logits in a numpy array."""

from __future__ import annotations

from typing import Any

import numpy as np


class LogitsSampler:
    """Chooses as edgeinfer.engines.llama.Sampler does: top-p, then temperature; temperature 0 takes the largest.

    `seed` makes the choices repeatable; None takes a fresh one.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self._temperature = temperature
        self._top_p = top_p
        self._random = np.random.default_rng(seed)

    def sample(self, engine: Any) -> int:
        """The token that follows what `engine` computed last: its `logits`, [vocabulary]."""
        logits = engine.logits.astype(np.float64)
        if self._temperature == 0:
            return int(logits.argmax())
        kept = self._nucleus(logits)
        chances = _softmax(logits[kept] / self._temperature)
        return int(kept[self._random.choice(len(kept), p=chances)])

    def _nucleus(self, logits: np.ndarray) -> np.ndarray:
        """Tokens that have the share top_p together, the fewest, one at least."""
        order = np.argsort(-logits, kind="stable")
        if self._top_p >= 1:
            return order
        shares = np.cumsum(_softmax(logits[order]))
        return order[: int(np.searchsorted(shares, self._top_p)) + 1]

    def close(self) -> None:
        """Nothing is open."""


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()
