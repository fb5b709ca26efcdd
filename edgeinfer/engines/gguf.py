"""The GGUF engine: llama.cpp under a byte budget.

`open_engine` loads a model without reading its weights, learns the order in which they are used, measures what the
process holds besides them, plans, and starts the pager. Where everything fits, stock llama.cpp takes over.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeinfer.budget import default_budget, parse_size, process_memory
from edgeinfer.engines import inmemory
from edgeinfer.engines.kernels import compute_bytes_per_second
from edgeinfer.engines.llama import DecodeAborted, LlamaContext, LlamaModel, Sampler
from edgeinfer.engines.overhead import Overhead, check_kv_cache_fits
from edgeinfer.errors import BudgetError, EngineError
from edgeinfer.modelfile import ModelFile, read_model_file
from edgeinfer.plan import SMALL_BYTES, Device, Plan, make_plan
from edgeinfer.storage import disk_bytes_per_second
from edgeinfer.system import default_threads, streaming_support

try:
    from edgeinfer.engines.paging import TOKEN_TABLES, PagedModel, make_hook
except ImportError:  # no C extension on this system: streaming_support() says so
    PagedModel = None

DEFAULT_CONTEXT = 4096
UBATCH = 512
POLL_SECONDS = 0.2

PassProgress = Callable[[int, int, float], None]


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
            for done in range(0, len(tokens), self.context.ubatch):
                batch = tokens[done : done + self.context.ubatch]
                self._interruptible(batch, lambda: progress and progress(done, len(tokens), self._pass_fraction()))
                if progress:
                    progress(done + len(batch), len(tokens), 0.0)
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
        if self._paged is None:
            self.context.decode(tokens)
            return
        before = self.position
        try:
            self._paged.begin_pass(tokens)
            try:
                self.context.decode(tokens)
                halted = self._hook.halted
            except DecodeAborted:
                halted = True
            finally:
                self._paged.end_pass()
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
        )

    def close(self) -> None:
        self._worker.shutdown()
        self.context.close()
        if self._paged is not None:
            self._paged.close()
        else:
            self.model.close()


def open_engine(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> GGUFEngine:
    """Load the model at `path` so that the process stays within `memory` (bytes or "2GiB"; None: see default_budget).

    `context_length` in tokens (None: 4096, or what the model was trained with if that is less). Raises
    ModelFileError, BudgetError, EngineError.
    """
    started = time.perf_counter()
    threads = threads or default_threads()
    file, budget, length = check_request(path, memory, context_length, threads)
    if not streaming_support():
        return _in_memory(file, inmemory.plan_without_streaming(file, budget), length, threads, started, progress)
    device = measure_device(file, threads, budget)
    prepared = Prepared(file, context_length=length, threads=threads)
    try:
        plan = prepared.plan(budget, device)
        if plan.mode == "streaming":
            return prepared.start(plan, started)
    except BaseException:
        prepared.close()
        raise
    prepared.close()
    return _in_memory(file, plan, length, threads, started, progress)


def check_request(
    path: str | os.PathLike, memory: int | str | None, context_length: int | None, threads: int
) -> tuple[ModelFile, int, int]:
    """(model file, budget in bytes, context in tokens) of what was asked for, checked before anything is loaded."""
    file = read_model_file(path)
    file.check_can_generate()
    budget = memory if isinstance(memory, int) else parse_size(memory) if memory else default_budget()
    length = context_length or min(file.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if streaming_support():
        check_kv_cache_fits(file, length, budget, lambda context: _smallest_budget(file, context, threads))
    return file, budget, length


class Prepared:
    """A model that is loaded without its weights, with its order of use and what else the process will hold."""

    def __init__(
        self,
        file: ModelFile,
        *,
        context_length: int,
        threads: int,
        ubatch: int = UBATCH,
        outputs_max: int = 1,
        flash_attention: bool | None = None,
    ):
        overhead = Overhead(file, ubatch)
        self.file = file
        self.paged = PagedModel(file)
        self.context = None
        try:
            overhead.model_loaded()
            self.context = LlamaContext(
                self.paged.model,
                context_length=context_length,
                ubatch=min(ubatch, context_length),
                threads=threads,
                outputs_max=outputs_max,
                flash_attention=flash_attention,
                **self.paged.context_callbacks,
            )
            overhead.context_made(self.context, outputs_max)
            self.uses = self.paged.record(self.context)
            self.overhead = overhead.entries(self.uses)
        except BaseException:
            self.close()
            raise

    def plan(self, budget_bytes: int, device: Device) -> Plan:
        """The best plan under the budget: stock llama.cpp where it fits, else streaming. Raises BudgetError."""
        types = {tensor.name: tensor.type for tensor in self.file.tensors}
        plan = make_plan(self.uses, budget_bytes, self.overhead, device, types, TOKEN_TABLES)
        return inmemory.plan_if_it_fits(self.file, plan) or plan

    def start(self, plan: Plan, started: float | None = None) -> GGUFEngine:
        """Begin reading as `plan` says."""
        self.paged.arm(plan, self.uses)
        return GGUFEngine(
            plan, self.paged.model, self.context, self.paged, self.paged.hook, started or time.perf_counter()
        )

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        self.paged.close()


def _smallest_budget(file: ModelFile, context_length: int, threads: int) -> int:
    """Bytes of the smallest budget that this model works in, as the planner says it."""
    prepared = Prepared(file, context_length=context_length, threads=threads)
    try:
        make_plan(prepared.uses, 0, prepared.overhead, Device(disk_bytes_per_second=1), {}, TOKEN_TABLES)
    except BudgetError as error:
        return error.smallest_bytes
    finally:
        prepared.close()
    raise EngineError("A model that needs no memory cannot be planned.")


def _in_memory(
    file: ModelFile,
    plan: Plan,
    context_length: int,
    threads: int,
    started: float,
    progress: Callable[[float], None] | None,
) -> GGUFEngine:
    hook = make_hook() if PagedModel is not None else None
    model = inmemory.load(file, progress)
    try:
        context = LlamaContext(
            model,
            context_length=context_length,
            ubatch=min(UBATCH, context_length),
            threads=threads,
            flash_attention=None,
            abort=hook.abort_address if hook else None,
            abort_data=hook.data_address if hook else None,
        )
    except BaseException:
        model.close()
        raise
    return GGUFEngine(plan, model, context, None, hook, started)


def measure_device(file: ModelFile, threads: int, budget_bytes: int, again: bool = False) -> Device:
    """How fast this machine reads this model's disk and multiplies by its types of weights; remembered."""
    used = {tensor.type for tensor in file.tensors if tensor.nbytes > SMALL_BYTES}
    room = budget_bytes // 4
    return Device(
        disk_bytes_per_second=disk_bytes_per_second(file.paths[0], again),
        compute_bytes_per_second={kind: compute_bytes_per_second(kind, threads, room, again) for kind in sorted(used)},
    )


@dataclass(frozen=True)
class PlannedModel:
    """A plan for a model that was looked at and not run."""

    file: ModelFile
    plan: Plan
    device: Device
    with_more: Callable[[int], Plan]  # the plan if the budget had so many bytes more


def plan_model(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    again: bool = False,
) -> PlannedModel:
    """What `open_engine` would do with the same arguments. `again`: measure the machine anew."""
    threads = threads or default_threads()
    file, budget, length = check_request(path, memory, context_length, threads)
    if not streaming_support():
        plan = inmemory.plan_without_streaming(file, budget)
        return PlannedModel(file, plan, Device(disk_bytes_per_second=0.0), lambda _more: plan)
    device = measure_device(file, threads, budget, again)
    prepared = Prepared(file, context_length=length, threads=threads)
    try:
        plan = prepared.plan(budget, device)
    finally:
        prepared.close()
    return PlannedModel(file, plan, device, lambda more: prepared.plan(budget + more, device))
