"""The GGUF engine: a model under llama.cpp, its one sequence of tokens, and the passes that compute it."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer.budget import process_memory
from edgeinfer.engines.llama import DecodeAborted, LlamaContext, LlamaModel, Sampler
from edgeinfer.errors import EngineError, TraceError
from edgeinfer.plan import Plan

if TYPE_CHECKING:
    from edgeinfer.engines.paging import PagedModel
    from edgeinfer.experts.trace import Trace

POLL_SECONDS = 0.2

PassProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class ExpertCounts:
    """What decoding asked of the cache of experts, since the model was loaded. See native/experts.h."""

    wanted: int
    hits: int
    guess_hits: int
    guesses: int
    guesses_used: int
    predicted: int
    predicted_right: int
    predicted_wanted: int


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the model was loaded; bytes and seconds."""

    load_seconds: float
    resident_bytes: int  # weights that stay in memory
    streamed_bytes: int  # weights read for one use each, rows included
    wait_seconds: float  # computing stood still for the disk
    disk_bytes_per_second: float | None  # while reading; None: nothing was read
    passes: int
    budget_bytes: int
    peak_memory_bytes: int
    experts: ExpertCounts | None = None  # None: no cache of experts


class TooManyExperts(EngineError):
    """A batch wants more experts of one layer than the cache holds: it has to be smaller."""


class GGUFEngine:
    """A loaded model and its one sequence of tokens. Every call that computes runs on a thread of the engine's own,
    so that Ctrl-C reaches the caller at once; a pass that was interrupted leaves the sequence as it was."""

    def __init__(
        self,
        plan: Plan,
        model: LlamaModel,
        context: LlamaContext,
        paged: PagedModel | None,
        hook: object | None,
        started: float,
    ):
        self.plan = plan
        self.model = model
        self.context = context
        self.outputs = "last"  # "all": a pass leaves the logits of each of its tokens; see LlamaContext.decode
        self.before_pass: Callable[[], object] | None = None  # called on the computing thread
        self._batch = context.ubatch  # tokens of a pass; fewer where the cache of experts is small
        self._paged = paged
        self._hook = hook
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="edgeinfer-compute")
        # Its thread starts now: a pool that Ctrl-C interrupts while it starts a thread forgets that thread.
        self._worker.submit(int).result()
        self._load_seconds = time.perf_counter() - started

    @property
    def mode(self) -> str:
        """ "streaming" or "in-memory"."""
        return self.plan.mode

    @property
    def context_length(self) -> int:
        return self.context.context_length

    @property
    def position(self) -> int:
        """Tokens in the sequence."""
        return self.context.position

    def prefill(self, tokens: Sequence[int], progress: PassProgress | None = None) -> None:
        """Append `tokens`, in batches that read the streamed weights once each; the last one's logits are kept.

        `progress` is called with (tokens done, all tokens, fraction of the batch that is being computed). Raises
        ReadError, EngineError, KeyboardInterrupt; the sequence is then as before.
        """
        start = self.position
        try:
            done = 0
            if len(tokens) > 1:  # other tokens may want fewer experts
                self._batch = min(self.context.ubatch, 2 * self._batch)
            while done < len(tokens):
                batch = tokens[done : done + self._batch]
                try:
                    self._interruptible(batch, lambda: progress and progress(done, len(tokens), self._pass_fraction()))
                except TooManyExperts:
                    self._batch = max(1, len(batch) // 2)
                    continue
                done += len(batch)
                if progress:
                    progress(done, len(tokens), 0.0)
        except BaseException:
            if self.position > start:
                self.context.truncate(start)
            raise

    def decode(self, tokens: Sequence[int]) -> None:
        """Append `tokens`; see `prefill`."""
        self.prefill(tokens)

    def read_pass(self) -> int:
        """Read the streamed weights of one pass without computing, and give the bytes; 0 where nothing is streamed."""
        return self._worker.submit(self._paged.read_pass).result() if self._paged is not None else 0

    def make_sampler(self, temperature: float, top_p: float, seed: int | None) -> Sampler:
        """See edgeinfer.engines.llama.Sampler."""
        return Sampler(temperature, top_p, seed, self.model)

    def sample(self, sampler: Sampler) -> int:
        """The token that follows the sequence."""
        return sampler.sample(self.context)

    def truncate(self, length: int) -> int:
        """Forget the tokens from position `length` on; gives the new length (0 where a state cannot be cut)."""
        return self.context.truncate(length)

    def _interruptible(self, tokens: Sequence[int], tick: Callable[[], object]) -> None:
        try:
            future = self._worker.submit(self._pass, tokens)
            while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
                tick()
        except BaseException:
            self._stop()
            raise
        future.result()

    def _stop(self) -> None:
        """End the pass that is being computed. Another Ctrl-C meanwhile must not leave it running: it is ignored."""
        while True:
            try:
                self._interrupt(True)
                self._worker.submit(int).result()  # behind the pass
                self._interrupt(False)
                return
            except KeyboardInterrupt:
                continue

    def _interrupt(self, on: bool) -> None:
        if self._hook is not None:
            self._hook.interrupt(on)
        if on and self._paged is not None:
            self._paged.abort()

    def _pass(self, tokens: Sequence[int]) -> None:
        if self.before_pass is not None:
            self.before_pass()
        if self._paged is None:
            self.context.decode(tokens, self.outputs)
            return
        before = self.position
        try:
            self._paged.begin_pass(tokens)
            try:
                self.context.decode(tokens, self.outputs)
                halted = self._hook.halted
            except DecodeAborted:
                halted = True
            finally:
                self._paged.end_pass()
            if halted and self._paged.too_many_experts and len(tokens) > 1:
                raise TooManyExperts()
            if halted:
                raise DecodeAborted("The computation was stopped.")
        except BaseException:
            if self.position > before:
                self.context.truncate(before)
            raise

    def _pass_fraction(self) -> float:
        return self._paged.pass_fraction() if self._paged is not None else 0.0

    def statistics(self) -> EngineStatistics:
        counters = self._paged.statistics() if self._paged is not None else {}
        read, busy = counters.get("read_bytes", 0), counters.get("busy_seconds", 0.0)
        return EngineStatistics(
            load_seconds=self._load_seconds,
            resident_bytes=self.plan.ledger.entries.get("resident_weights", 0),
            streamed_bytes=read - counters.get("resident_bytes", 0) + counters.get("row_bytes", 0),
            wait_seconds=counters.get("wait_seconds", 0.0),
            disk_bytes_per_second=read / busy if busy else None,
            passes=counters.get("passes", 0),
            budget_bytes=self.plan.budget_bytes,
            peak_memory_bytes=process_memory().peak_rss_bytes,
            experts=self._expert_counts(),
        )

    def _expert_counts(self) -> ExpertCounts | None:
        found = self.expert_statistics()
        return ExpertCounts(**{field: found[field] for field in ExpertCounts.__annotations__}) if found else None

    def expert_statistics(self) -> dict[str, int]:
        """Counters of the cache of experts; {} without one. See native/experts.h."""
        return self._paged.expert_statistics() if self._paged is not None else {}

    def take_trace(self, prompt_tokens: int) -> Trace:
        """The experts chosen for the sequence so far, whose first `prompt_tokens` were a prompt; TraceError for none."""
        from edgeinfer.experts.record import make_trace

        pools = self.plan.pools
        if pools is None:
            raise TraceError("Nothing was recorded: the model was not opened with record_routing.")
        log = self._paged.hook.take_routing()
        return make_trace(self._paged.file, pools.layers, pools.num_experts, log, prompt_tokens)

    def close(self) -> None:
        self._worker.shutdown()
        self.context.close()
        if self._paged is not None:
            self._paged.close()
        else:
            self.model.close()
