"""Opening a GGUF model under a byte budget.

The model is loaded without reading its weights; the order in which they are used and what the process holds besides
them are learned from that; then the plan is made and the pager started. Where everything fits, stock llama.cpp takes
over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgeinfer.budget import budget_of
from edgeinfer.engines import inmemory
from edgeinfer.engines.gguf import GGUFEngine
from edgeinfer.engines.kernels import compute_bytes_per_second
from edgeinfer.engines.llama import LlamaContext
from edgeinfer.engines.overhead import Overhead, check_kv_cache_fits
from edgeinfer.errors import BudgetError, EngineError
from edgeinfer.modelfile import ModelFile, read_model_file
from edgeinfer.plan import SMALL_BYTES, Device, Plan, make_plan, predict
from edgeinfer.storage import disk_bytes_per_second
from edgeinfer.system import default_threads, streaming_support

if streaming_support():
    from edgeinfer.engines.paging import TOKEN_TABLES, PagedModel, make_hook

DEFAULT_CONTEXT = 4096
UBATCH = 512


def open_engine(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
    record_routing: bool = False,
) -> GGUFEngine:
    """Load the model at `path` so that the process stays within `memory` (bytes or "2GiB"; None: see default_budget).

    `context_length` in tokens (None: 4096, or what the model was trained with if that is less). `record_routing`: log
    the experts that are chosen, for `GGUFEngine.take_trace`. Raises ModelFileError, BudgetError, EngineError.
    """
    started = time.perf_counter()
    threads = threads or default_threads()
    file, budget, length = check_request(path, memory, context_length, threads)
    if not streaming_support():
        return _in_memory(file, inmemory.plan_without_streaming(file, budget), length, threads, started, progress)
    prepared = Prepared(file, context_length=length, threads=threads)
    try:
        plan = prepared.plan(budget, pooled=record_routing)
        if record_routing and plan.pools is None:
            raise EngineError(f"{file.paths[0]} has no experts whose use could be recorded. Give a mixture of experts.")
        if plan.mode == "streaming":
            return prepared.start(plan, started, record_routing)
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
    budget = budget_of(memory)
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
        float32_cache: bool = False,
        wrap_callbacks: Callable[[dict[str, int]], dict[str, int]] = dict,
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
                float32_cache=float32_cache,
                **wrap_callbacks(self.paged.context_callbacks),
            )
            overhead.context_made(self.context, outputs_max)
            self.uses = self.paged.record(self.context)
            self.overhead = overhead.entries(self.uses)
        except BaseException:
            self.close()
            raise

    def plan(self, budget_bytes: int, pooled: bool = False) -> Plan:
        """The best plan under the budget: stock llama.cpp where it fits, else streaming. Raises BudgetError."""
        plan = self._make_plan(budget_bytes, pooled)
        return inmemory.plan_if_it_fits(self.file, plan) or plan

    def smallest_budget(self) -> int:
        """Bytes of the smallest budget that this model works in, as the planner says it."""
        try:
            self._make_plan(0)
        except BudgetError as error:
            return error.smallest_bytes
        raise EngineError("A model that needs no memory cannot be planned.")

    def _make_plan(self, budget_bytes: int, pooled: bool = False) -> Plan:
        used = self.file.num_experts_used
        return make_plan(self.uses, budget_bytes, self.overhead, TOKEN_TABLES, used, self.context.ubatch, pooled)

    def start(self, plan: Plan, started: float | None = None, record_routing: bool = False) -> GGUFEngine:
        """Begin reading as `plan` says."""
        self.paged.arm(plan, self.uses)
        self.paged.log_routing(record_routing)
        return GGUFEngine(
            plan, self.paged.model, self.context, self.paged, self.paged.hook, started or time.perf_counter()
        )

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        self.paged.close()


def _smallest_budget(file: ModelFile, context_length: int, threads: int) -> int:
    prepared = Prepared(file, context_length=context_length, threads=threads)
    try:
        return prepared.smallest_budget()
    finally:
        prepared.close()


def _in_memory(
    file: ModelFile,
    plan: Plan,
    context_length: int,
    threads: int,
    started: float,
    progress: Callable[[float], None] | None,
) -> GGUFEngine:
    hook = make_hook() if streaming_support() else None
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
    """A plan for a model that was looked at and not run. `device` is None where weights cannot be streamed."""

    file: ModelFile
    plan: Plan
    device: Device | None
    prepared: Prepared | None

    def predict(self, more_bytes: int = 0) -> float | None:
        """Tokens per second, if the budget had so many bytes more."""
        if self.device is None or self.prepared is None:
            return None
        types = {tensor.name: tensor.type for tensor in self.file.tensors}
        plan = self.prepared.plan(self.plan.budget_bytes + more_bytes)
        return predict(plan, self.prepared.uses, self.device, types)


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
        return PlannedModel(file, inmemory.plan_without_streaming(file, budget), None, None)
    device = measure_device(file, threads, budget, again)
    prepared = Prepared(file, context_length=length, threads=threads)
    try:
        plan = prepared.plan(budget)
    finally:
        prepared.close()
    return PlannedModel(file, plan, device, prepared)
