"""Whether reading ahead pays: measured now and then by decoding some tokens with it and some without.

Guesses cost reads and processor time; what they save depends on the disk, the routing and the size of the experts, so
no figure of precision tells. Results are the same either way.
"""

from __future__ import annotations

from statistics import median

FIRST_TOKENS = 32  # with reading ahead: the cache fills, and nothing can be compared yet
BLOCK_TOKENS = 4  # of one kind in a row; the first one of them still feels the block before and does not count
BLOCKS = (True, False, False, True, True, False, False, True)  # as many of both, neither always first
HOLD_TOKENS = 480  # between two trials, with the better way of the last one
LEAST_GAIN = 0.01  # below it guesses are not worth their reads


class PredictionTrial:
    """Ask `predicting` before a token is decoded, and tell `record` the seconds that it took."""

    def __init__(self) -> None:
        self._better = True
        self._left = FIRST_TOKENS  # tokens until the next trial begins
        self._seconds: list[float] = []  # of the trial's tokens, in order

    @property
    def predicting(self) -> bool:
        """Whether the next token's experts are read ahead."""
        return self._better if self._left > 0 else BLOCKS[len(self._seconds) // BLOCK_TOKENS]

    def record(self, seconds: float) -> None:
        """The token took so long."""
        if self._left > 0:
            self._left -= 1
            return
        self._seconds.append(seconds)
        if len(self._seconds) == len(BLOCKS) * BLOCK_TOKENS:
            self._better = self._median(True) < (1 - LEAST_GAIN) * self._median(False)
            self._left, self._seconds = HOLD_TOKENS, []

    def _median(self, predicting: bool) -> float:
        return median(
            seconds
            for number, seconds in enumerate(self._seconds)
            if BLOCKS[number // BLOCK_TOKENS] == predicting and number % BLOCK_TOKENS
        )
