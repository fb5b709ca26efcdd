"""Opening an ONNX model under a byte budget: one stock session where it fits, else stages that are
prepared once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgeinfer.budget import budget_of, format_size, process_memory
from edgeinfer.errors import BudgetError, EngineError, ModelFileError
from edgeinfer.onnx.graph import OnnxFile, read_onnx
from edgeinfer.onnx.plan import OnnxPlan
from edgeinfer.onnx.ports import Port, make_port
from edgeinfer.onnx.providers import Choice, choose_provider
from edgeinfer.onnx.runtime import explained
from edgeinfer.onnx.stock import StockModel, stock_plan
from edgeinfer.system import default_threads, streaming_support

if streaming_support():
    from edgeinfer.onnx import cache
    from edgeinfer.onnx.identity import entry_key
    from edgeinfer.onnx.prepared import FORMAT, Prepared, default_stage_bytes
    from edgeinfer.onnx.preparing import prepare_in_child
    from edgeinfer.onnx.staged import StagedModel
    from edgeinfer.onnx.stages import StaleEntry

Progress = Callable[[float], None]
Say = Callable[[str], None]

_DISK_FACTOR = 2.5  # of the weights: as they are, and rearranged
_PREPARING_SHARE = 0.7  # of the time until the first answer, where a model is prepared


@dataclass(frozen=True)
class Opened:
    """A model that can run, and what it takes and gives."""

    runner: StockModel | StagedModel
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def open_model(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> tuple[OnnxFile, Opened]:
    """See edgeinfer.engines.onnx.open_onnx."""
    code_bytes = process_memory().file_bytes
    file = read_onnx(path)
    choice = choose_provider(provider)
    budget = budget_of(memory)
    plan = plan_stock(file, budget)
    if plan is not None:
        return file, _open_stock(file, plan, threads, choice)
    if choice.name != "cpu":
        if provider is not None:
            raise BudgetError(
                f"The budget of {format_size(budget)} does not hold this model, and {choice.name} needs all "
                "of it: "
                f"{format_size(stock_plan(file, budget, '').ledger.total)}. Raise --memory, or compute on "
                "the CPU."
            )
        choice = replace(
            choose_provider("cpu"), reason=f"{choice.name} needs the whole model within the budget."
        )
    return file, _open_staged(file, budget, threads or default_threads(), choice, code_bytes, progress, say)


def plan_stock(file: OnnxFile, budget_bytes: int) -> OnnxPlan | None:
    """The plan of one stock session where it fits or nothing else works; None: stages are needed."""
    plan = stock_plan(file, budget_bytes, "The whole model fits the budget.")
    if plan.ledger.total <= budget_bytes:
        return plan
    if not streaming_support():
        return replace(plan, reason="Weights cannot be streamed on this system.")
    texts = [name for name, kind, _ in (*file.inputs, *file.outputs) if kind in ("string", "other")]
    if texts:
        return replace(plan, reason=f"{texts[0]!r} is text or no tensor, which stages do not hand over.")
    return None


def _open_stock(file: OnnxFile, plan: OnnxPlan, threads: int | None, choice: Choice) -> Opened:
    runner = StockModel(file, plan, threads, choice)
    with explained(file.path, ModelFileError):  # names may be no text
        inputs, outputs = (
            tuple(make_port(port.name, port.type, port.shape) for port in ports)
            for ports in (runner.session.get_inputs(), runner.session.get_outputs())
        )
    return Opened(runner, inputs, outputs)


def _open_staged(
    file: OnnxFile,
    budget: int,
    threads: int,
    choice: Choice,
    code_bytes: int,
    progress: Progress | None,
    say: Say | None,
) -> Opened:
    stage_bytes = default_stage_bytes(file.weights_bytes)
    key = entry_key(file.paths, FORMAT, stage_bytes)
    for attempt in range(2):
        entry = cache.find_or_make(
            key,
            int(file.weights_bytes * _DISK_FACTOR),
            _maker(file, stage_bytes, budget, _part(progress, 0, _PREPARING_SHARE), say),
        )
        try:
            prepared = Prepared.read(entry.folder)
            loading = _part(progress, _PREPARING_SHARE, 1)
            runner = StagedModel(file.path, entry, prepared, budget, threads, choice, code_bytes, loading)
        except (StaleEntry, OSError, ValueError, KeyError, TypeError) as error:
            entry.close()
            if attempt == 1 or not cache.remove(entry.folder):
                raise EngineError(
                    f"{file.path} could not be prepared so that it can be used: {error}"
                ) from error
            continue
        except BaseException:
            entry.close()
            raise
        inputs, outputs = prepared.inputs, prepared.outputs
        return Opened(
            runner, tuple(make_port(*port) for port in inputs), tuple(make_port(*port) for port in outputs)
        )
    raise AssertionError("unreachable")


def _maker(
    file: OnnxFile, stage_bytes: int, budget: int, progress: Progress, say: Say | None
) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        held = process_memory().rss_bytes
        if held >= budget:  # nothing is prepared for minutes that cannot run then
            raise BudgetError(
                f"The budget of {format_size(budget)} is too small for this model: the smallest that works "
                f"is above the {format_size(held)} that the process holds without it. Raise --memory.",
                smallest_bytes=held,
            )
        if say:
            size = format_size(int(file.weights_bytes * 2.1))
            say(
                f"Preparing {file.path.name} for this processor, once. It takes about {size} in "
                f"{folder.parent}."
            )
        prepare_in_child(file.path, folder, stage_bytes, budget - held, progress)

    return make


def _part(progress: Progress | None, start: float, end: float) -> Progress:
    return lambda fraction: progress(start + (end - start) * fraction) if progress else None
