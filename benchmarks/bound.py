"""How fast a model that does not fit its memory can be at best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The bound of one run. Time per token is at least what computing takes, and what the disk takes for the
    bytes that memory cannot hold: those that a pass uses, less the budget without the fixed overhead.

    Whatever the engine really streamed, and its ring, do not count: only what must be streamed.
    """

    weight_bytes: int  # that one pass uses
    budget_bytes: int
    overhead_bytes: int  # what the process holds besides weights and ring
    compute_seconds: float  # per token, everything in memory
    disk_bytes_per_second: float

    @property
    def streamed_bytes(self) -> int:
        """Bytes per token that have to come from the disk."""
        return max(0, self.weight_bytes - max(0, self.budget_bytes - self.overhead_bytes))

    @property
    def disk_seconds(self) -> float:
        return self.streamed_bytes / self.disk_bytes_per_second

    @property
    def tokens_per_second(self) -> float:
        return 1 / max(self.compute_seconds, self.disk_seconds)

    def share(self, tokens_per_second: float) -> float:
        """How much of the bound a measured speed reaches; 1 is all of it."""
        return tokens_per_second / self.tokens_per_second


def first_token_limit(bytes_to_read: int, disk_bytes_per_second: float) -> float:
    """Seconds from load to first token that are accepted: one pass over what has to be read, plus 0.5."""
    return bytes_to_read / disk_bytes_per_second + 0.5
