"""Measurements of ONNX encoders that do not fit their memory: see docs/benchmarks.md."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from benchmarks.bound import Bound
from benchmarks.cgroup import drop_page_cache
from benchmarks.measure import ChildError, Settings, run_child

BATCHES = (1, 32)
SHARES = (0.5, 0.9, 1.15)  # of the weight bytes: half, nearly all, and about what stock needs
HALF = SHARES[0]


class OnnxMeasurements:
    """One made encoder, under edgeinfer and under a stock session, in turn; bytes and seconds."""

    def __init__(self, model: Path, settings: Settings, cache: Path):
        self.model = Path(model).resolve()
        self.settings = settings
        self.weights_bytes = self._data.stat().st_size
        self.noise = 0.0
        self._environment = {**os.environ, "XDG_CACHE_HOME": str(cache.resolve())}

    @property
    def _data(self) -> Path:
        return self.model.with_name(self.model.name + ".data")

    def child(self, engine: str, batch: int, limit: int | None, passes: int) -> dict:
        """One process under test from an empty page cache; ChildError says how it ended when it gave no
        numbers.
        """
        command = [sys.executable, "-m", "benchmarks.onnx_child", engine, str(self.model)]
        command += ["--batch", str(batch), "--threads", str(self.settings.threads), "--passes", str(passes)]
        if engine == "edgeinfer" and limit is not None:
            command += ["--memory", str(limit)]
        drop_page_cache([self._data])
        result = run_child(engine, command, limit, self._environment)
        self.noise = max(self.noise, result["others_cpu"])
        return result

    def measure(self) -> dict:
        """Every batch size without a limit and under each one. Stock's own passes are the bound's compute."""
        batches = {str(batch): self._batch(batch) for batch in BATCHES}
        return {
            "name": self.model.name,
            "weights_bytes": self.weights_bytes,
            "batches": batches,
            "noise": self.noise,
        }

    def _batch(self, batch: int) -> dict:
        passes = 5 if batch == 1 else 3
        free = [self._without_limit(batch, passes) for _ in range(self.settings.rounds)]
        compute = min(run["stock"]["median_pass_seconds"] for run in free)
        limits = [self._under_limit(batch, share, passes, compute) for share in SHARES]
        again = self.child("stock", batch, None, passes)["median_pass_seconds"]
        for part in limits:
            for run in part["rounds"]:
                self._add_bound(run["edgeinfer"], min(compute, again))
        return {"compute_seconds": min(compute, again), "free": free, "limits": limits}

    def _without_limit(self, batch: int, passes: int) -> dict:
        runs = {engine: self.child(engine, batch, None, passes) for engine in ("edgeinfer", "stock")}
        _say(f"{self.model.name}, batch {batch}, no limit: {_speeds(runs)}")
        return runs

    def _under_limit(self, batch: int, share: float, passes: int, compute: float) -> dict:
        limit = round(self.weights_bytes * share)
        rounds = []
        for _ in range(self.settings.rounds):
            runs: dict = {"edgeinfer": self.child("edgeinfer", batch, limit, passes)}
            try:
                runs["stock"] = self.child("stock", batch, limit, passes)
            except ChildError as error:
                runs["stock_ended"] = str(error)
            _say(f"{self.model.name}, batch {batch}, {share:.0%}: {_speeds(runs)}")
            rounds.append(runs)
        return {"limit_share": share, "limit_bytes": limit, "rounds": rounds}

    def _add_bound(self, run: dict, compute: float) -> None:
        """What must be streamed counts, not what was; where nothing is streamed, computing alone."""
        pass_bytes = run["resident_bytes"] + run["streamed_bytes"]
        bandwidth = run["read_alone_bytes_per_second"] or float("inf")
        bound = Bound(pass_bytes, run["budget_bytes"], run["overhead_bytes"], compute, bandwidth)
        run["pass_weight_bytes"] = pass_bytes
        run["bound_streamed_bytes"] = bound.streamed_bytes
        run["bound"] = bound.tokens_per_second
        run["bound_share"] = bound.share(run["passes_per_second"])


def over_rounds(rounds: list[dict], engine: str, key: str) -> float | None:
    """The median over the rounds in which this engine gave numbers."""
    values = [run[engine][key] for run in rounds if engine in run and run[engine][key] is not None]
    return statistics.median(values) if values else None


def _speeds(runs: dict) -> str:
    told = [
        f"{engine} {runs[engine]['median_pass_seconds']:.3f} s" for engine in runs if engine != "stock_ended"
    ]
    return ", ".join(told + ([runs["stock_ended"]] if "stock_ended" in runs else []))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
