"""A prepared model, stage by stage: its sessions, and the pager that brings in what the next one needs.

Each session has its weights at addresses of its own, for it has mapped them. Those mappings are replaced by memory that
cannot be touched. A weight that stays is read to its address once. A streamed one is read into the ring, and its pages
are moved to its address for the time of its stage, and back.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgeinfer import _native
from edgeinfer.errors import EngineError, ReadError
from edgeinfer.onnx.plan import CHUNK_BYTES, READING_THREADS, Block, OnnxPlan
from edgeinfer.onnx.prepare import Prepared
from edgeinfer.onnx.runtime import explained
from edgeinfer.onnx.stage_files import StageFiles, open_stage, page_ranges

_RESIDENT, _STREAMED = 0, 1
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
        self._pager: _native.Pager | None = None
        self._ring: _native.Arena | None = None
        self._resident: list[Block] = []
        self._read_before: dict[str, float] = {}
        self.blocks = blocks_of(prepared)
        self.num_stages = len(prepared.stages)
        self._streamed: frozenset[str] = frozenset()
        self._by_stage: list[list[tuple[int, Block]]] = [[] for _ in prepared.stages]
        for number, block in enumerate(self.blocks):
            self._by_stage[block.stage].append((number, block))
        with _one_load:
            _share_arena(activation_bytes)
            for number, files in enumerate(prepared.stages):
                self._open(number, files, threads)
                give_back_memory()
                if progress:
                    progress((number + 1) / len(prepared.stages))

    def _open(self, number: int, files: StageFiles, threads: int) -> None:
        with explained(self._path):
            session, found = open_stage(self._folder, files, threads)
        if page_ranges(found) != files.ranges:
            raise StaleEntry(f"stage {number} of {self._path} does not use its prepared weights as it did")
        self._sessions.append(session)
        for (_, block), mapping in zip(self._by_stage[number], found):
            self._homes[block.name] = mapping.address
            _native.guard_pages(mapping.address, mapping.nbytes)

    def arm(self, plan: OnnxPlan) -> None:
        """From now on keep and stream as `plan` says; what was in memory is dropped."""
        self._disarm()
        self._resident = [block for block in self.blocks if block.name in plan.resident]
        for block in self._resident:
            _native.open_pages(self._homes[block.name], block.nbytes)
        self._streamed = plan.streamed
        if not self.blocks:
            return
        self._ring = _native.Arena(plan.ring_bytes) if plan.ring_bytes else None
        data = [self._folder / files.data for files in self._files]
        used = sorted({block.stage for block in self.blocks})
        blocks = [
            (
                used.index(block.stage),
                _STREAMED if block.name in plan.streamed else _RESIDENT,
                block.offset,
                min(block.nbytes, data[block.stage].stat().st_size - block.offset),
                0 if block.name in plan.streamed else self._homes[block.name],
            )
            for block in self.blocks
        ]
        self._pager = self._checked(
            _native.Pager,
            [(str(data[stage]), True) for stage in used],
            blocks,
            list(range(len(blocks))),
            self._ring,
            CHUNK_BYTES,
            READING_THREADS,
        )

    def _disarm(self) -> None:
        pager, self._pager = self._pager, None
        if pager is not None:
            self._count(pager)
            pager.close()
        self._ring = None
        for block in self._resident:
            _native.guard_pages(self._homes[block.name], block.nbytes)
        self._resident = []

    def run(self, feeds: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """The `wanted` outputs. Raises ReadError, EngineError, BudgetError by way of ONNX Runtime's words."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        results: dict[str, np.ndarray] = {name: feeds[name].copy() for name in wanted if name in feeds}
        if self._pager is not None:
            self._checked(self._pager.begin_pass)
        try:
            for number, (session, files) in enumerate(zip(self._sessions, self._files)):
                with self._brought_in(number), explained(self._path):
                    inputs = {name: values[name] for name in files.inputs}
                    outputs = session.run_with_ort_values(list(files.outputs), inputs)
                values.update(zip(files.outputs, outputs))
                results.update((name, values[name].numpy()) for name in files.outputs if name in wanted)
                del inputs, outputs
                for name in [name for name in values if self._last_use.get(name, -1) <= number]:
                    del values[name]
        finally:
            if self._pager is not None:
                self._checked(self._pager.end_pass)
        return {name: results[name] for name in wanted}

    @contextmanager
    def _brought_in(self, number: int) -> Iterator[None]:
        """Inside, the weights of stage `number` are where its session wants them."""
        moved: list[tuple[int, int, int]] = []
        try:
            for block_number, block in self._by_stage[number]:
                address = self._checked(self._pager.acquire, block_number)
                if block.name in self._streamed:
                    home = self._homes[block.name]
                    _native.move_pages(address, home, block.nbytes, False)
                    moved.append((home, address, block.nbytes))
            yield
        finally:
            for home, address, nbytes in moved:
                _native.move_pages(home, address, nbytes, True)
            if self._pager is not None:
                self._pager.release()

    def read_pass(self) -> int:
        """Read what one pass streams and compute nothing: how fast the disk alone would be. Gives the bytes."""
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
                f"The prepared files of {self._path} could not be used any more: {error.strerror}. They lie in "
                f"{self._folder}; remove that folder and open the model again."
            ) from error

    def statistics(self) -> dict[str, float]:
        """The pager's counters, of all plans since the start."""
        now = self._pager.statistics() if self._pager is not None else {}
        names = ("read_bytes", "resident_bytes", "wait_seconds", "busy_seconds")
        return {name: self._read_before.get(name, 0) + now.get(name, 0) for name in names}

    def _count(self, pager: _native.Pager) -> None:
        for name, value in pager.statistics().items():
            self._read_before[name] = self._read_before.get(name, 0) + value

    def close(self) -> None:
        self._disarm()
        self._sessions.clear()


class StaleEntry(EngineError):
    """What was prepared does not fit this ONNX Runtime any more: it has to be made again."""


def blocks_of(prepared: Prepared) -> list[Block]:
    """The blocks of all stages, in order of use."""
    return [
        Block(f"{number}:{offset}", number, offset, nbytes)
        for number, files in enumerate(prepared.stages)
        for offset, nbytes in files.ranges
    ]


def _last_uses(stages: Sequence[StageFiles]) -> dict[str, int]:
    return {name: number for number, files in enumerate(stages) for name in files.inputs}


def _share_arena(most_bytes: int) -> None:
    """One arena for the activations of all sessions that are made now: each one's own would never be given back.

    Behind `most_bytes` it refuses, so that large inputs end with an error instead of all memory.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Regions that double: chunks of many sizes find their place again in them, and only what is used is touched.
    settings = {"max_mem": most_bytes, "arena_extend_strategy": 0, "initial_chunk_size_bytes": 1 << 20}
    ort.create_and_register_allocator(where, ort.OrtArenaCfg(settings))


def give_back_memory() -> None:
    """What was freed while a session was made goes back to the system; the next one would not find it all again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
