"""A staged model under its budget: what its inputs need besides weights decides how many weights can stay.

Nobody knows what a model computes with before it has seen an input: shapes vary. So the first pass of a new
shape streams all weights, which is not slower than reading them, and is measured; the rest of the budget is
for weights then.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from edgeinfer.budget import format_size, process_memory, reset_peak
from edgeinfer.errors import BudgetError, EngineError
from edgeinfer.onnx.cache import Entry
from edgeinfer.onnx.plan import Block, OnnxPlan, make_plan
from edgeinfer.onnx.prepared import Prepared
from edgeinfer.onnx.providers import Choice
from edgeinfer.onnx.stages import Stages, blocks_of
from edgeinfer.remembered import remembered

_MIB = 1 << 20
_SLACK = 8 * _MIB  # what comes and goes: allocator fragments, thread stacks, Python objects
_LEAST_ACTIVATIONS = 8 * _MIB  # what any input is given room for
_FIRST_SESSION_BYTES = 8 * _MIB  # code and tables of ONNX Runtime that are touched; measured
_SESSION_BYTES = _MIB // 4  # of each stage, besides its graph; measured

Case = tuple[tuple[str, tuple[int, ...]], ...]  # shapes of inputs by their names; outputs that are bound
Sizes = Mapping[str, tuple[int, ...]]  # of inputs, by their names
Compute = Callable[[], dict[str, Any]]
_NONE: Mapping[str, None] = MappingProxyType({})


@dataclass(frozen=True)
class _Taken:
    """Bytes that a pass takes besides weights. `working`: while it computes; `kept`: results, which the
    caller may hold.
    """

    working: int
    kept: int = 0


class _TakesMoreError(Exception):
    """A pass takes more than inputs of its sizes did before."""


class StagedModel:
    """The stages of a prepared model, planned for the shapes that they see.

    `code_bytes`: pages of libraries that were in memory before the model was prepared. Where that took all the
    memory there is, some of them are gone, and come back.
    """

    def __init__(
        self,
        path: Path,
        entry: Entry,
        prepared: Prepared,
        budget_bytes: int,
        threads: int,
        choice: Choice,
        code_bytes: int = 0,
        progress: Callable[[float], None] | None = None,
    ):
        self._entry = entry
        self._budget = budget_bytes
        self._choice = choice
        self._reason = f"{prepared.reason}." if prepared.reason else ""
        self._key = f"{entry.folder.name} {threads}"
        self._armed: OnnxPlan | None = None
        self._woken = False  # idle weights were looked at after the first pass
        self._taken: dict[Case, _Taken] = {}  # what each input that was seen takes
        self._left = 0  # bytes that inputs which were refused have left in the arena
        blocks = blocks_of(prepared)
        overhead = _expected_overhead(entry.folder, prepared, blocks, code_bytes)
        least = self._make_plan(blocks, len(prepared.stages), overhead, measuring=True)
        most = budget_bytes - least.ledger.total + _LEAST_ACTIVATIONS  # for activations
        self._stages = Stages(path, entry.folder, prepared, threads, most, progress)
        try:
            self._overhead = _held_now(overhead, blocks, code_bytes + _FIRST_SESSION_BYTES)
            self.plan = self._plan()
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """The `wanted` outputs by name. BudgetError where the input needs more than the budget leaves."""
        sizes = {name: array.shape for name, array in feeds.items()}
        return self._pass(sizes, lambda: self._stages.run(feeds, wanted))

    def run_values(
        self, inputs: Mapping[str, OrtValue], outputs: Mapping[str, OrtValue | None]
    ) -> dict[str, OrtValue]:
        """See OnnxModel.run_values."""
        return self._pass(_sizes(inputs), lambda: self._stages.run_values(inputs, outputs), outputs)

    def make_room(
        self, passes: Sequence[Mapping[str, OrtValue]], outputs: Mapping[str, OrtValue | None]
    ) -> int:
        """See OnnxModel.make_room."""

        def compute() -> dict[str, OrtValue]:
            results = [self._stages.run_values(inputs, outputs) for inputs in passes]
            return results[0]

        self._learn(_sizes(passes[0]), compute, outputs)
        return self._activations()

    @property
    def defaults(self) -> frozenset[str]:
        return self._stages.defaults

    def _pass(self, sizes: Sizes, compute: Compute, bound: Mapping[str, OrtValue | None] = _NONE) -> Any:
        found = self._learn(sizes, compute, bound)
        is_new = found is not None or not self._woken
        if found is None:
            found = self._run_known(sizes, compute, bound)
        if is_new:
            self._woken = True
            if self._stages.wake_touched():
                self.plan = self._plan()
        return found

    def _learn(self, sizes: Sizes, compute: Compute, bound: Mapping[str, OrtValue | None]) -> Any:
        """Plan for inputs that are larger than those before: what they take is measured, unless that is kept
        from an earlier time. What `compute` gave, where it was run for that.
        """
        case = _case(sizes, bound)
        if any(_covers(known, case) for known in self._taken):
            return None
        measured: list[tuple[_Taken, Any]] = []

        def measure() -> int:
            measured.append(self._measure(sizes, compute, bound))
            taken = measured[0][0]
            return taken.working + taken.kept

        try:
            # Behind other inputs, it is not what this one takes by itself.
            is_first = not self._taken and not self._left
            key = f"onnx activations {self._key} {case}"
            total = remembered(key, measure, kind=int) if is_first else measure()
            self._taken[case] = measured[0][0] if measured else _Taken(total)
            self.plan = self._plan()
        except BudgetError:
            self._taken.pop(case, None)  # smaller inputs may still fit
            self._count_left()
            raise
        return measured[0][1] if measured else None

    def _run_known(self, sizes: Sizes, compute: Compute, bound: Mapping[str, OrtValue | None]) -> Any:
        """A pass of sizes that were seen. Sizes inside a model may depend on values too: where these take more
        than those that were measured, and so more than the budget, the pass is made again as a new one.
        """
        try:
            with self._watched():
                return self._run(self.plan, sizes, compute)
        except BudgetError:
            self._count_left()
            raise
        except _TakesMoreError:
            self._count_left()
            case = _case(sizes, bound)
            self._taken = {known: taken for known, taken in self._taken.items() if not _covers(known, case)}
        found = self._learn(sizes, compute, bound)
        return self._run(self.plan, sizes, compute) if found is None else found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, a pass ends with _TakesMoreError where the process is beyond the budget, and it is by that
        pass.
        """
        if self._armed is not self.plan:
            self._disarm()
        expected = _held_bytes() + _SLACK
        if self._armed is None:  # all that the plan counts comes now, but for what the arena holds already
            expected = max(expected, self._opened_bytes() + self._activations() + _SLACK)
            expected += self.plan.ledger.total - self.plan.overhead_bytes

        def watch() -> None:
            if _held_bytes() > max(expected, self._budget):
                raise _TakesMoreError

        self._stages.watch = watch
        try:
            yield
        finally:
            self._stages.watch = None

    def _disarm(self) -> None:
        self._armed = None
        self._stages.disarm()

    def _count_left(self) -> None:
        """The arena does not shrink: what a refused input has made of it is counted from now on."""
        self._disarm()
        most = self._budget - self._plan(measuring=True).ledger.total + _LEAST_ACTIVATIONS - self._kept()
        self._left = min(most, max(self._left, process_memory().rss_bytes - self._opened_bytes()))
        self.plan = self._plan()

    def _opened_bytes(self) -> int:
        """What the process held once the model was opened."""
        return self._overhead["interpreter"] + self._overhead["sessions"]

    def _run(self, plan: OnnxPlan, sizes: Sizes, compute: Compute) -> Any:
        if self._armed is not plan:
            self._armed = None
            self._stages.arm(plan)
            self._armed = plan
        try:
            return compute()
        except EngineError as error:
            if "Available memory of" in str(error):  # the arena's limit
                raise self._too_large(sizes) from error
            raise

    def _measure(
        self, sizes: Sizes, compute: Compute, bound: Mapping[str, OrtValue | None]
    ) -> tuple[_Taken, Any]:
        """(bytes besides weights and what an opened model holds, outputs) of a pass that keeps as little
        as it can. Outputs that the caller has memory for, `bound`, are not counted.

        What the arena holds of earlier passes is added: at most what those took.
        """
        plan = self._plan(measuring=True)
        self._disarm()
        before = process_memory().rss_bytes
        arena = min(self._working(), max(0, before - self._opened_bytes()))
        reset_peak()
        results = self._run(plan, sizes, compute)
        more = process_memory().peak_rss_bytes - before - (plan.ledger.total - plan.overhead_bytes)
        own = [value for name, value in results.items() if bound.get(name) is None]
        # The caller may keep these until the next ones, which need not find the place of those before.
        return _Taken(max(0, more) + arena, 2 * sum(map(_num_bytes, own))), results

    def _too_large(self, sizes: Sizes) -> BudgetError:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in sizes.items())
        return BudgetError(
            f"The budget of {format_size(self._budget)} is too small for this input ({shapes}): what is "
            "computed "
            "with it does not fit beside the weights of one stage. Raise --memory, or give a smaller input."
        )

    def _plan(self, measuring: bool = False) -> OnnxPlan:
        """For the inputs that were seen; before the first one, as if it took little."""
        activations = _LEAST_ACTIVATIONS if measuring else max(_LEAST_ACTIVATIONS, self._activations())
        overhead = dict(self._overhead, activations=activations)
        return self._make_plan(self._stages.blocks, self._stages.num_stages, overhead, measuring)

    def _working(self) -> int:
        return max([self._left, *(taken.working for taken in self._taken.values())])

    def _activations(self) -> int:
        return self._working() + self._kept()

    def _kept(self) -> int:
        return max((taken.kept for taken in self._taken.values()), default=0)

    def _make_plan(
        self, blocks: Sequence[Block], num_stages: int, overhead: Mapping[str, int], measuring: bool
    ) -> OnnxPlan:
        plan = make_plan(blocks, num_stages, self._budget, overhead, measuring, self._reason)
        return replace(plan, provider=self._choice.name, provider_reason=self._choice.reason)

    def read_pass(self) -> int:
        """See Stages.read_pass."""
        return self._stages.read_pass()

    def counters(self) -> dict[str, float]:
        """See Stages.statistics."""
        return self._stages.statistics()

    def close(self) -> None:
        self._stages.close()
        self._entry.close()


def _held_bytes() -> int:
    """By this process, now; asked behind each stage, and so in the way that takes the least time."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _sizes(inputs: Mapping[str, OrtValue]) -> Sizes:
    return {name: tuple(value.shape()) for name, value in inputs.items()}


def _num_bytes(value: np.ndarray | OrtValue) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else value.numpy().nbytes


def _case(sizes: Sizes, bound: Mapping[str, OrtValue | None]) -> Case:
    given = [name for name in sorted(bound) if bound[name] is not None]
    return (*((name, tuple(sizes[name])) for name in sorted(sizes)), *((f"> {name}", ()) for name in given))


def _covers(known: Case, case: Case) -> bool:
    """Whether inputs of `case` need no more than those of `known` did."""
    return len(known) == len(case) and all(
        name == other_name and len(one) == len(other) and all(a >= b for a, b in zip(one, other))
        for (name, one), (other_name, other) in zip(known, case)
    )


def _expected_overhead(
    folder: Path, prepared: Prepared, blocks: Sequence[Block], code_bytes: int
) -> dict[str, int]:
    """Before sessions are made: what they will take. Graphs are held as messages, and weights in them once
    more.
    """
    graphs = sum((folder / files.model).stat().st_size for files in prepared.stages)
    return {
        "interpreter": _held_with_code(code_bytes),
        "sessions": 3 * graphs + _FIRST_SESSION_BYTES + _SESSION_BYTES * len(prepared.stages),
        "activations": _LEAST_ACTIVATIONS,
        "load_peak": _load_peak(blocks),
    }


def _held_with_code(code_bytes: int) -> int:
    """What the process holds, with `code_bytes` at least of libraries."""
    now = process_memory()
    return now.rss_bytes + max(0, code_bytes - now.file_bytes)


def _held_now(expected: Mapping[str, int], blocks: Sequence[Block], code_bytes: int) -> dict[str, int]:
    now = _held_with_code(code_bytes)
    interpreter = min(now, expected["interpreter"])
    return {"interpreter": interpreter, "sessions": now - interpreter, "load_peak": _load_peak(blocks)}


def _load_peak(blocks: Sequence[Block]) -> int:
    return _SLACK + sum(block.nbytes for block in blocks) // 512  # page tables: 8 bytes a page
