"""The measurements: children run in turn, each from an empty page cache and under its limit."""

from __future__ import annotations

import json
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.bound import Bound, first_token_limit
from benchmarks.cgroup import drop_page_cache, run_command
from benchmarks.disk import disk_bandwidth, fresh_memory_seconds_per_gb
from edgeinfer.modelfile import read_model_file

ROOT = Path(__file__).parents[1]
LIMIT_SHARES = (0.45, 0.78)  # of the model's weight bytes
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    threads: int
    rounds: int = 2
    tokens: int = 12  # decoded by edgeinfer under a limit, after the first
    stock_tokens: int = 4  # the same, by stock llama.cpp, which is slow there
    memory_rounds: int = 3
    memory_tokens: int = 24  # decoded by each where everything fits
    # decoded before those that count: new memory is slow, and by then reading ahead was tried with and without
    expert_warmup: int = 72
    stock_warmup: int = 8  # the same, to fill the page cache
    expert_tokens: int = 24  # decoded by edgeinfer and in memory
    prefill: int = 512
    prefill_limits: int = 2  # how many of LIMIT_SHARES
    context: int = 512

    @classmethod
    def quick(cls, threads: int) -> Settings:
        return cls(
            threads,
            rounds=1,
            tokens=6,
            stock_tokens=2,
            memory_rounds=1,
            memory_tokens=8,
            expert_tokens=8,
            prefill_limits=1,
        )


class Noise:
    """How much of the processors others use while a child of this process runs, from the construction on."""

    def __init__(self) -> None:
        self._started, self._busy, self._ours = time.monotonic(), _busy_seconds(), _child_seconds()

    def others(self) -> float:
        """0 to 1 of all processors, time stolen by a hypervisor included. The child must have ended."""
        ours = _child_seconds() - self._ours
        possible = (time.monotonic() - self._started) * psutil.cpu_count()
        return min(1.0, max(0.0, (_busy_seconds() - self._busy - ours) / possible))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class ChildError(Exception):
    """A process under test did not give its numbers."""


class Measurements:
    """Each method measures one thing and gives plain numbers: bytes, seconds, tokens per second."""

    def __init__(self, model: Path, settings: Settings):
        self.model = Path(model).resolve()
        self.settings = settings
        self.file = read_model_file(self.model)
        self.noise = 0.0  # the largest share of the processors that others used during a child's run

    @property
    def weights_bytes(self) -> int:
        return self.file.weights_bytes

    def child(
        self, engine: str, *options: object, limit: int | None = None, context: int | None = None
    ) -> dict:
        """One process under test; ChildError says how it ended when it gave no numbers."""
        settings = self.settings
        command = [sys.executable, "-m", "benchmarks.child", engine, str(self.model)]
        command += ["--threads", str(settings.threads), "--ctx", str(context or settings.context)]
        command += [str(option) for option in options]
        result = run_child(engine, command, limit)
        self.noise = max(self.noise, result["others_cpu"])
        return result

    def plain(self) -> dict:
        """Decoding with all weights in memory and the kernels that streaming uses."""
        run = self.child("plain", "--tokens", self.settings.memory_tokens)
        _say(f"all in memory, the same kernels: {run['median_token_seconds']:.3f} s a token")
        return run

    def streaming(self) -> dict:
        """edgeinfer and stock llama.cpp in turn under each limit.

        The bound's compute is measured before and after; noise only slows, so the faster one counts.
        """
        plain = [self.plain()]
        limits = [self._under_limit(share) for share in LIMIT_SHARES]
        plain.append(self.plain())
        compute = min(run["median_token_seconds"] for run in plain)
        for part in limits:
            for number in part["rounds"]:
                number["edgeinfer"].update(self._bounds(number["edgeinfer"], compute))
        defaults = self._stock_defaults(LIMIT_SHARES[0])
        return {"compute_seconds": compute, "plain": plain, "limits": limits, "stock_defaults": defaults}

    def _under_limit(self, share: float) -> dict:
        limit = round(self.weights_bytes * share)
        rounds = []
        for number in range(self.settings.rounds):
            ours = self._streaming_run(limit)
            theirs = self._stock_run(limit)
            rates = ours["tokens_per_second"], theirs["tokens_per_second"]
            _say(
                "{:.0%}, round {}: edgeinfer {:.3f}, stock {:.3f} tokens/s".format(share, number + 1, *rates)
            )
            rounds.append({"edgeinfer": ours, "stock": theirs, "same_tokens": same_start(ours, theirs)})
        return {"limit_share": share, "limit_bytes": limit, "rounds": rounds}

    def _streaming_run(self, limit: int) -> dict:
        before = disk_bandwidth(self.model)
        drop_page_cache(self.file.paths)
        fresh = fresh_memory_seconds_per_gb()
        run = self.child("edgeinfer", "--memory", limit, "--tokens", self.settings.tokens, limit=limit)
        run["fresh_memory_seconds_per_gb"] = fresh
        return {**run, "bandwidth_before": before, "bandwidth_after": disk_bandwidth(self.model)}

    def _bounds(self, run: dict, compute: float) -> dict:
        """What one run is held against."""
        bandwidth = run["read_alone_bytes_per_second"]
        arguments = (run["budget_bytes"], run["overhead_bytes"], compute, bandwidth)
        needed = Bound(run["pass_weight_bytes"], *arguments)
        everything = Bound(self.weights_bytes, *arguments)
        return {
            "bound_streamed_bytes": needed.streamed_bytes,
            "bound": needed.tokens_per_second,
            "bound_share": needed.share(run["tokens_per_second"]),
            "bound_streamed_bytes_all_weights": everything.streamed_bytes,
            "bound_all_weights": everything.tokens_per_second,
            "bound_share_all_weights": everything.share(run["tokens_per_second"]),
            "first_token_limit_seconds": first_token_limit(run["pass_weight_bytes"], bandwidth),
        }

    def _stock_run(self, limit: int) -> dict:
        """Not repacked: repacked weights are a copy that no limit below the model's size can hold."""
        drop_page_cache(self.file.paths)
        return self.child("stock", "--tokens", self.settings.stock_tokens, limit=limit)

    def _stock_defaults(self, share: float) -> str:
        """How stock llama.cpp ends under a limit with every default, so with repacked weights."""
        drop_page_cache(self.file.paths)
        try:
            run = self.child("stock", "--repack", "--tokens", 1, limit=round(self.weights_bytes * share))
        except ChildError as error:
            return str(error)
        return f"{run['tokens_per_second']:.3f} tokens/s"

    def prefill(self) -> dict:
        """One batch of prefill, with all weights in memory and under budgets."""
        plain = self.child("plain", "--prefill", self.settings.prefill, context=2 * self.settings.prefill)
        _say(f"all in memory: prefill {plain['prefill_tokens_per_second']:.2f} tokens/s")
        shares = LIMIT_SHARES[: self.settings.prefill_limits]
        return {"plain": plain, "budgets": [self._prefill_within(share) for share in shares]}

    def _prefill_within(self, share: float) -> dict:
        """Without a cgroup, so that the process's peak is its own doing."""
        budget = round(self.weights_bytes * share)
        count = self.settings.prefill
        drop_page_cache(self.file.paths)
        run = self.child("edgeinfer", "--memory", budget, "--prefill", count, context=2 * count)
        _say(f"{share:.0%}: prefill {run['prefill_tokens_per_second']:.2f} tokens/s")
        overhead = run["peak_memory_bytes"] - run["resident_bytes"] - run["ring_bytes"]
        return {"budget_share": share, **run, "measured_overhead_bytes": overhead}

    def in_memory(self) -> dict:
        """edgeinfer without a limit and stock llama.cpp at its best, in turn: repacked where that runs."""
        tokens = ("--tokens", self.settings.memory_tokens)
        repack, refusal = ("--repack",), None
        rounds = []
        for number in range(self.settings.memory_rounds):
            ours = self.child("edgeinfer", *tokens)
            try:
                theirs = self.child("stock", *tokens, *repack)
            except ChildError as error:
                if not repack:
                    raise
                repack, refusal = (), str(error)
                theirs = self.child("stock", *tokens)
            rates = ours["tokens_per_second"], theirs["tokens_per_second"]
            _say("in memory, round {}: edgeinfer {:.3f}, stock {:.3f} tokens/s".format(number + 1, *rates))
            rounds.append({"edgeinfer": ours, "stock": theirs})
        return {"rounds": rounds, "repack_refusal": refusal}


def median(rounds: list[dict], engine: str, key: str) -> float:
    """The median over rounds of a number of one engine."""
    return statistics.median(number[engine][key] for number in rounds)


def run_child(
    engine: str, command: Sequence[str], limit: int | None, environment: Mapping[str, str] | None = None
) -> dict:
    """The numbers of one process under test, with OOM kills and what others took of the processors meanwhile.
    ChildError says how it ended when it gave none.
    """
    noise = Noise()
    try:
        result, kills = run_command(command, limit, TIMEOUT_SECONDS, cwd=ROOT, environment=environment)
    except subprocess.TimeoutExpired:
        raise ChildError(f"{engine} did not end within {TIMEOUT_SECONDS} s") from None
    if result.returncode != 0:
        raise ChildError(f"{engine} {ending(result, kills)}")
    return {**json.loads(result.stdout.splitlines()[-1]), "oom_kills": kills, "others_cpu": noise.others()}


def ending(result: subprocess.CompletedProcess, kills: int) -> str:
    """How a process ended that did not end well."""
    if kills:
        return "was killed by the kernel: the limit is too small for it"
    if result.returncode < 0:
        return f"died of {signal.Signals(-result.returncode).name}"
    lines = result.stderr.strip().splitlines()
    return f"ended with exit code {result.returncode}: {lines[-1] if lines else 'it said nothing'}"


def same_start(one: dict, other: dict) -> bool:
    """Whether two greedy runs agree as far as the shorter one goes."""
    return all(a == b for a, b in zip(one["tokens"], other["tokens"]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
