"""A prepared model, stage by stage: its sessions, and the pager that brings in what the next one needs.

Each session has its weights at addresses of its own, for it has mapped them. Those mappings are replaced by
memory that cannot be touched. A weight that stays is read to its address once. A streamed one is read into
the ring, and its pages are moved to its address for the time of its stage, and back.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgeinfer import _native
from edgeinfer.errors import EngineError, ReadError
from edgeinfer.onnx.homes import Mapping, drop, give_back_memory, is_touched
from edgeinfer.onnx.plan import CHUNK_BYTES, READING_THREADS, Block, OnnxPlan
from edgeinfer.onnx.prepared import Prepared
from edgeinfer.onnx.runtime import explained
from edgeinfer.onnx.stage_files import StageFiles, open_stage, page_ranges

_RESIDENT, _STREAMED, _ROWS = 0, 1, 2  # block_kind of native/pager.h
_NO_ARENA_BYTES = 1 << 20
_one_load = threading.Lock()  # mappings of a session are told from others by what was there before


class Stages:
    """The sessions of a prepared model, and after `arm` the weights that they compute with.

    Life: construct, `arm` with a plan, `run` as often as wanted, `arm` again with another plan, `close`.
    """

    def __init__(self, path: Path, folder: Path, prepared: Prepared, threads: int, activation_bytes: int,
                 progress: Callable[[float], None] | None = None):  # fmt: skip
        self._path = path
        self._folder = folder
        self._files = prepared.stages
        self._outputs = [name for name, _, _ in prepared.outputs]
        self._sessions: list[ort.InferenceSession] = []
        self._homes: dict[str, int] = {}  # of each block: the address where its session wants it
        self._last_use = _last_uses(prepared.stages)
        self._defaults: list[frozenset[str]] = []  # of each stage: inputs that need not be given
        self._pager: _native.Pager | None = None
        self._counting = threading.Lock()  # another thread may look at the counters
        self._ring: _native.Arena | None = None
        self._plan: OnnxPlan | None = None
        self._idle: list[Block] = []
        self._read_before: dict[str, float] = {}
        self.watch: Callable[[], None] | None = None  # called behind each stage; it may end the pass
        self.blocks = blocks_of(prepared)
        self.num_stages = len(prepared.stages)
        self._stages_with_data = [number for number, files in enumerate(prepared.stages) if files.data_bytes]
        self._by_stage: list[list[tuple[int, Block]]] = []  # of each stage: numbers of its blocks, and those
        self._tables: list[list[tuple[int, Block]]] = []
        with _one_load:
            _share_arena(activation_bytes)
            for number, files in enumerate(prepared.stages):
                self._open(number, files, threads)
                give_back_memory()
                if progress:
                    progress((number + 1) / len(prepared.stages))

    def _open(self, number: int, files: StageFiles, threads: int) -> None:
        if not files.are_whole(self._folder):
            raise StaleEntry(f"the files of stage {number} are not as they were written")
        with explained(self._path):
            session, found = open_stage(self._folder, files, threads, files.ranges)
        if page_ranges(found) != files.ranges:
            raise StaleEntry(f"stage {number} does not use its prepared weights as it did")
        self._sessions.append(session)
        self._defaults.append(frozenset(port.name for port in session.get_overridable_initializers()))
        self._last_use.update(dict.fromkeys(self._defaults[-1], number))
        for index, mapping in enumerate(found):
            block = Block(f"{number}:{index}", number, mapping.offset, mapping.nbytes)
            self._homes[block.name] = mapping.address
            if mapping.offset in files.idle:
                drop(mapping)
                self._idle.append(block)
            else:
                _native.guard_pages(mapping.address, mapping.nbytes)

    @property
    def defaults(self) -> frozenset[str]:
        """Inputs of the model that have a value where none is given."""
        return frozenset().union(*self._defaults)

    def wake_touched(self) -> bool:
        """Weights that were thought idle and were read by a pass become blocks like others; True where
        there were some.
        """
        woken = [block for block in self._idle if _is_touched(self._homes[block.name], block)]
        if not woken:
            return False
        self.disarm()
        for block in woken:
            self._idle.remove(block)
            _native.guard_pages(self._homes[block.name], block.nbytes)
        self.blocks = sorted([*self.blocks, *woken], key=lambda block: (block.stage, block.offset))
        return True

    def arm(self, plan: OnnxPlan) -> None:
        """From now on keep and stream as `plan` says; what was in memory is dropped."""
        self.disarm()
        self._plan = plan
        self._by_stage = [[] for _ in self._files]
        self._tables = [[] for _ in self._files]
        described, order = [], []
        for number, block in enumerate(self.blocks):
            described.append(self._describe(block, plan))
            if block.name in plan.rows:
                self._tables[block.stage].append((number, block))
                continue
            order.append(number)
            self._by_stage[block.stage].append((number, block))
            if block.name in plan.resident:
                _native.open_pages(self._homes[block.name], block.nbytes)
        if not described:
            return
        self._ring = _native.Arena(plan.ring_bytes) if plan.ring_bytes else None
        if self._ring is not None:  # all of it is there from now on: what a pass takes besides can be measured
            np.frombuffer(self._ring, np.uint8)[:: mmap.PAGESIZE] = 0
        sources = [(str(self._folder / self._files[stage].data), True) for stage in self._stages_with_data]
        self._pager = self._checked(
            _native.Pager, sources, described, order, self._ring, CHUNK_BYTES, READING_THREADS
        )

    def _describe(self, block: Block, plan: OnnxPlan) -> tuple[int, int, int, int, int]:
        """(source, kind, offset, bytes, home) for the pager."""
        source, home = self._stages_with_data.index(block.stage), self._homes[block.name]
        if block.name in plan.rows:
            table = block.table
            return source, _ROWS, table.offset, table.nbytes, home + table.offset - block.offset
        nbytes = min(
            block.nbytes, self._files[block.stage].data_bytes - block.offset
        )  # the last page may end early
        kind = _STREAMED if block.name in plan.streamed else _RESIDENT
        return source, kind, block.offset, nbytes, home

    def disarm(self) -> None:
        """Drop all weights that are in memory. The next thing to do is `arm`."""
        with self._counting:
            pager, self._pager = self._pager, None
            if pager is not None:
                self._count(pager)
                pager.close()
        self._ring = None
        for block in self.blocks:
            if self._plan is not None and block.name not in self._plan.streamed:
                _native.guard_pages(self._homes[block.name], block.nbytes)
        self._plan = None

    def run(self, feeds: abc.Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """The `wanted` outputs. Raises ReadError, EngineError, BudgetError by way of ONNX Runtime's words."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        results: dict[str, np.ndarray] = {name: feeds[name].copy() for name in wanted if name in feeds}

        def keep(name: str, value: ort.OrtValue) -> None:
            if name in wanted:
                results[name] = value.numpy().copy()  # a view would hold the arena's memory for as long

        self._pass(values, {}, keep)
        return {name: results[name] for name in wanted}

    def run_values(
        self, inputs: abc.Mapping[str, ort.OrtValue], outputs: abc.Mapping[str, ort.OrtValue | None]
    ) -> dict[str, ort.OrtValue]:
        """The `outputs`, written into the values that are given for them, else into new ones."""
        results = {name: inputs[name] for name in outputs if name in inputs}

        def keep(name: str, value: ort.OrtValue) -> None:
            if name in outputs:
                results[name] = value

        self._pass(dict(inputs), outputs, keep)
        return results

    def _pass(
        self,
        values: dict[str, ort.OrtValue],
        bound: abc.Mapping[str, ort.OrtValue | None],
        keep: Callable[[str, ort.OrtValue], None],
    ) -> None:
        """Every stage once; `values` is used up, `keep` sees what the stages hand over and give."""
        if self._pager is not None:
            self._checked(self._pager.begin_pass)
        try:
            for number, files in enumerate(self._files):
                with self._brought_in(number, values), explained(self._path):
                    found = self._run_stage(number, values, bound)
                values.update(found)
                for name, value in found.items():
                    keep(name, value)
                del found
                for name in [name for name in values if self._last_use.get(name, -1) <= number]:
                    del values[name]
                if self.watch is not None:
                    self.watch()
        finally:
            if self._pager is not None:
                self._checked(self._pager.end_pass)

    def _run_stage(
        self,
        number: int,
        values: abc.Mapping[str, ort.OrtValue],
        bound: abc.Mapping[str, ort.OrtValue | None],
    ) -> dict[str, ort.OrtValue]:
        session, names = self._sessions[number], list(self._files[number].outputs)
        given = self._defaults[number] & values.keys()
        inputs = {name: values[name] for name in (*self._files[number].inputs, *given)}
        if all(bound.get(name) is None for name in names):
            return dict(zip(names, session.run_with_ort_values(names, inputs)))
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            if bound.get(name) is None:
                binding.bind_output(name)
            else:
                binding.bind_ortvalue_output(name, bound[name])
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs()))

    @contextmanager
    def _brought_in(self, number: int, values: abc.Mapping[str, ort.OrtValue]) -> Iterator[None]:
        """Inside, the weights of stage `number` are where its session wants them."""
        if self._pager is None:
            yield
            return
        moved: list[tuple[int, int, int]] = []
        opened: list[int] = []
        try:
            for block_number, block in self._tables[number]:
                rows = _rows(block, values[block.table.indices])
                opened.append(block_number)
                self._checked(self._pager.open_rows, block_number, block.table.row_bytes, rows)
            for block_number, block in self._by_stage[number]:
                address = self._checked(self._pager.acquire, block_number)
                if block.name in self._plan.streamed:
                    home = self._homes[block.name]
                    _native.move_pages(address, home, block.nbytes, False)
                    moved.append((home, address, block.nbytes))
            yield
        finally:
            for home, address, nbytes in moved:
                _native.move_pages(home, address, nbytes, True)
            self._pager.release()
            for block_number in opened:
                self._pager.close_rows(block_number)

    def read_pass(self) -> int:
        """Read what one pass streams and compute nothing: how fast the disk alone is. Gives the bytes."""
        if self._pager is None:
            return 0
        before = self._pager.statistics()["read_bytes"]
        self._checked(self._pager.begin_pass)
        for blocks in self._by_stage:
            for number, _ in blocks:
                self._checked(self._pager.acquire, number)
            self._pager.release()
        self._checked(self._pager.end_pass)
        return self._pager.statistics()["read_bytes"] - before

    def _checked(self, call: Callable, *arguments: object) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno == errno.ECANCELED:
                raise
            raise ReadError(
                f"The prepared files of {self._path} could not be used any more: {error.strerror}. They lie "
                "in "
                f"{self._folder}; remove that folder and open the model again."
            ) from error

    def statistics(self) -> dict[str, float]:
        """The pager's counters, of all plans since the start."""
        names = ("read_bytes", "resident_bytes", "wait_seconds", "busy_seconds")
        with self._counting:
            now = self._pager.statistics() if self._pager is not None else {}
            return {name: self._read_before.get(name, 0) + now.get(name, 0) for name in names}

    def _count(self, pager: _native.Pager) -> None:
        for name, value in pager.statistics().items():
            self._read_before[name] = self._read_before.get(name, 0) + value

    def close(self) -> None:
        self.disarm()
        with _one_load:  # mappings that go while others are looked for would be taken for theirs
            self._sessions.clear()
            _share_arena(_NO_ARENA_BYTES)  # else the last one stays, with all that it holds, until the next


class StaleEntry(EngineError):
    """What was prepared does not fit this ONNX Runtime any more: it has to be made again."""


def blocks_of(prepared: Prepared) -> list[Block]:
    """The blocks of all stages, in order of use; not what is most likely idle."""
    found = []
    for number, files in enumerate(prepared.stages):
        for index, (offset, nbytes) in enumerate(files.ranges):
            tables = [table for table in files.tables if offset <= table.offset < offset + nbytes]
            if offset not in files.idle:
                found.append(
                    Block(f"{number}:{index}", number, offset, nbytes, tables[0] if tables else None)
                )
    return found


def _rows(block: Block, indices: ort.OrtValue) -> np.ndarray:
    """The rows that `indices` look up, cast to 32 bits first or not; those outside are for ONNX Runtime to
    refuse.
    """
    table = block.table
    num_rows = table.nbytes // table.row_bytes
    exact = np.unique(indices.numpy().astype(np.int64, copy=False))
    wanted = np.union1d(exact, exact.astype(np.int32))
    wanted = np.where(wanted < 0, wanted + num_rows, wanted)
    return wanted[(wanted >= 0) & (wanted < num_rows)].astype(np.int32)


def _is_touched(address: int, block: Block) -> bool:
    try:
        return is_touched(Mapping(address, block.offset, block.nbytes))
    except OSError:  # not told here: it might be
        return True


def _last_uses(stages: Sequence[StageFiles]) -> dict[str, int]:
    return {name: number for number, files in enumerate(stages) for name in files.inputs}


def _share_arena(most_bytes: int) -> None:
    """One arena for the activations of all sessions that are made now: each one's own would never be given
    back.

    Behind `most_bytes` it refuses, so that large inputs end with an error instead of all memory.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Regions that double: chunks of many sizes find their place again in them, and only what is used is
    # touched.
    settings = {"max_mem": most_bytes, "arena_extend_strategy": 0, "initial_chunk_size_bytes": 1 << 20}
    ort.create_and_register_allocator(where, ort.OrtArenaCfg(settings))
