"""How a stream went: real-time factor, latency, what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class StreamReport:
    """`latency`: seconds from when a piece was whole until its results were there (50 %, 95 %, 99 % of the
    pieces stayed under it); where a source is read as fast as it goes, from when computing began.
    `real_time_factor`: seconds of computing a second of stream; below 1 a model keeps up. None for frames,
    which have no length of their own."""

    seconds: float | None
    pieces: int
    dropped: int
    dropped_seconds: float | None
    computing_seconds: float
    real_time_factor: float | None
    latency: dict[str, float]
    steps: dict[str, int]
    open_share: dict[str, float] = field(
        default_factory=dict
    )  # of a gated model: the part of the stream it ran on

    def line(self) -> str:
        """One line for people."""
        parts = []
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s of sound")
        if self.real_time_factor is not None:
            parts.append(f"real-time factor {self.real_time_factor:.3g}")
        if self.latency:
            parts.append(
                "latency " + ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in self.latency.items())
            )
        parts.append(
            f"{self.dropped} of {self.pieces} pieces dropped"
            if self.dropped
            else f"{self.pieces} pieces, none dropped"
        )
        parts += [f"{name} ran on {share:.0%}" for name, share in self.open_share.items()]
        return ", ".join(parts)


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """{"p50": ..., "p95": ..., "p99": ...}; empty where nothing was measured."""
    if not len(latencies):
        return {}
    found = np.percentile(np.asarray(latencies), (50, 95, 99))
    return {f"p{share}": float(value) for share, value in zip((50, 95, 99), found)}
