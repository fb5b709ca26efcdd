"""Measurements of mixture-of-experts models whose experts do not all fit: see docs/benchmarks.md."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from benchmarks.cgroup import drop_page_cache
from benchmarks.measure import Measurements, Settings, same_start

SHARE = 0.52  # of the weight bytes
NEARLY_ALL = 0.90
# What the meter between tokens holds: the limit is the same for all, so the budget is less by it
METER_BYTES = 16 << 20
PREDICTABLE_RECALL = 0.7  # from here on routing counts as predictable: the least of a trained model's layers
BOUND_GOALS = {True: 0.90, False: 0.75}  # by whether routing is predictable and prediction on


def cache_bound(compute_seconds: float, missed_bytes: float, disk_bytes_per_second: float) -> float:
    """Tokens per second at best: computing, and reading what a cache of that size misses, hide each other."""
    return 1 / max(compute_seconds, missed_bytes / disk_bytes_per_second)


class ExpertMeasurements:
    """Each method measures one model; the numbers are plain: bytes, seconds, tokens per second, shares."""

    def __init__(self, model: Path, settings: Settings):
        self.settings = settings
        self.runs = Measurements(model, settings)

    @property
    def noise(self) -> float:
        return self.runs.noise

    def compared(self) -> dict:
        """Against stock llama.cpp, against all in memory with nearly all of the size, and a prefill."""
        return {
            **self._measured(stock=True, share=SHARE),
            "nearly_all": self._rounds_of(NEARLY_ALL, {"on": ()}),
            "prefill": self._prefill(),
        }

    def alone(self) -> dict:
        """Against the bound only."""
        return self._measured(stock=False, share=SHARE)

    def _measured(self, stock: bool, share: float) -> dict:
        """Compute is measured before and after, the faster one counts: noise only slows."""
        before = self._plain()
        least_recent = self._decode(share, "--policy", "lru", "--no-predict")
        part = self._rounds_of(share, {"on": (), "off": ("--no-predict",)}, stock)
        plain = [before, self._plain()]
        compute = min(run["median_token_seconds"] for run in plain)
        missed = least_recent["streamed_bytes_per_token"]
        for number in part["rounds"]:
            for name in ("on", "off"):
                run = number[name]
                run["bound"] = cache_bound(compute, missed, run["read_alone_bytes_per_second"])
                run["bound_share"] = run["tokens_per_second"] / run["bound"]
            number["same_tokens"] = all(same_start(run, plain[0]) for run in number.values())
        return {
            "name": self.runs.model.name,
            "weights_bytes": self.runs.weights_bytes,
            "compute_seconds": compute,
            "plain": plain,
            "lru": least_recent,
            **part,
        }

    def _rounds_of(self, share: float, variants: dict[str, tuple[str, ...]], stock: bool = False) -> dict:
        rounds = []
        for number in range(self.settings.rounds):
            runs = {name: self._decode(share, *options) for name, options in variants.items()}
            if stock:
                runs["stock"] = self._stock(share)
            speeds = ", ".join(f"{name} {run['tokens_per_second']:.3f}" for name, run in runs.items())
            _say(f"{self.runs.model.name} at {share:.0%}, round {number + 1}: {speeds} tokens/s")
            rounds.append(runs)
        return {"limit_share": share, "limit_bytes": self._limit(share), "rounds": rounds}

    def _limit(self, share: float) -> int:
        return round(self.runs.weights_bytes * share)

    def _plain(self) -> dict:
        run = self.runs.child("plain", *self._tokens(self.settings.expert_tokens, self.settings.expert_warmup))
        _say(f"{self.runs.model.name} in memory, the same kernels: {run['tokens_per_second']:.3f} tokens/s")
        return run

    def _decode(self, share: float, *options: str) -> dict:
        limit = self._limit(share)
        drop_page_cache(self.runs.file.paths)
        tokens = self._tokens(self.settings.expert_tokens, self.settings.expert_warmup)
        return self.runs.child("edgeinfer", "--memory", limit - METER_BYTES, *tokens, *options, limit=limit)

    def _stock(self, share: float) -> dict:
        drop_page_cache(self.runs.file.paths)
        tokens = self._tokens(self.settings.stock_tokens, self.settings.stock_warmup)
        return self.runs.child("stock", *tokens, limit=self._limit(share))

    def _tokens(self, count: int, warmup: int) -> tuple[str, ...]:
        return "--tokens", str(count), "--warmup", str(warmup)

    def _prefill(self) -> dict:
        """One batch of prefill in a cgroup of the budget's size; the meter is not used."""
        limit, count = self._limit(SHARE), self.settings.prefill
        drop_page_cache(self.runs.file.paths)
        run = self.runs.child(
            "edgeinfer", "--memory", limit, "--prefill", count, limit=limit, context=2 * count
        )
        _say(f"{self.runs.model.name}: prefill {run['prefill_tokens_per_second']:.2f} tokens/s")
        return run


def measure_experts(path: Path, settings: Settings, compare: bool) -> dict:
    """One model; `compare`: not only against the bound. `noise`: of the busiest run."""
    measurements = ExpertMeasurements(path, settings)
    numbers = measurements.compared() if compare else measurements.alone()
    return {**numbers, "noise": measurements.noise}


def over_rounds(part: dict, variant: str, key: str) -> float:
    """The median over the rounds of a number of one variant."""
    return statistics.median(number[variant][key] for number in part["rounds"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
