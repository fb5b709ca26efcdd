"""Writes planned tensors into a GGUF file: piece by piece, several at a time, in a few megabytes of memory.

Each step reads some rows of the checkpoint, converts them and writes them to their place, which is known
beforehand; so steps need no order, and reading, converting and writing overlap.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgeinfer.budget import format_size, process_memory
from edgeinfer.errors import BudgetError, ModelFileError
from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer, SourceFile, TargetFile
from edgeinfer.exporters.conversion import STORAGE, OutOfRange, convert, interleave_halves
from edgeinfer.exporters.safetensors_file import ITEM_BYTES, TensorRecord
from edgeinfer.exporters.tensor_plan import PlannedTensor
from edgeinfer.system import usable_processors

_STEP_BYTES = (8 << 20, 4 << 20, 2 << 20, 1 << 20)  # the largest that the memory allows is taken
_MAX_THREADS = 4
_TEMPORARIES = 4 << 20  # of a thread while it converts


@dataclass(frozen=True)
class Placed:
    """A planned tensor, the type it gets, and the byte of the file where it begins."""

    tensor: PlannedTensor
    type: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_elements * ITEM_BYTES[self.type]


@dataclass(frozen=True)
class _Step:
    """`num_elements` elements of `record` from `first` on become the bytes of the file from `offset` on."""

    placed: Placed
    record: TensorRecord
    first: int
    num_elements: int
    offset: int
    aligned: bool
    last: bool


def write_tensors(
    path: Path,
    placed: Sequence[Placed],
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write all tensors into the existing file `path`.

    `memory`: what this process may hold, in bytes; None: whatever it holds, and some 100 MB. Raises
    BudgetError where that is too little, OutOfRange for numbers that F16 cannot hold, ModelFileError where the
    checkpoint cannot be read, OSError for the target.
    """
    threads, step_bytes = _fitting(placed, memory)
    end = max(item.offset + -(-item.num_bytes // PAGE) * PAGE for item in placed)
    total = sum(item.num_bytes for item in placed)
    if shutil.disk_usage(path.parent).free < end - path.stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with ExitStack() as stack:
        target = TargetFile(path, end)
        stack.callback(target.close)
        sources = {}
        for source in {piece.record.path for item in placed for piece in item.tensor.pieces}:
            sources[source] = SourceFile(source)
            stack.callback(sources[source].close)
        work = _Work(target, sources, _largest_step(placed, step_bytes))
        done = sum(work.write_values(item) for item in placed if item.tensor.values is not None)
        steps = (step for item in placed for step in _steps(item, step_bytes))
        for count in _each_done(threads, work.do, steps):
            done += count
            if progress:
                progress(done / total)


def _fitting(placed: Sequence[Placed], memory: int | None) -> tuple[int, int]:
    """Threads and bytes of a step that fit into what `memory` leaves."""
    most = min(_MAX_THREADS, max(2, usable_processors()))
    if memory is None:
        return most, _STEP_BYTES[0]
    held, needed = process_memory().rss_bytes, 0
    for step_bytes in _STEP_BYTES:
        for threads in range(most, 0, -1):
            needed = held + threads * (_buffer_bytes(_largest_step(placed, step_bytes)) + _TEMPORARIES)
            if needed <= memory:
                return threads, step_bytes
    raise BudgetError(
        f"Exporting this checkpoint takes {format_size(needed)} of memory, --memory allows "
        f"{format_size(memory)}. Give {format_size(needed + (1 << 20))} or more.",
        smallest_bytes=needed,
    )


def _buffer_bytes(sizes: tuple[int, int]) -> int:
    """Of a thread: what is read, the same in another order, and what is written."""
    read, written = sizes
    return 2 * read + written + 4 * PAGE


def _largest_step(placed: Sequence[Placed], step_bytes: int) -> tuple[int, int]:
    """Bytes read and bytes written by the largest step."""
    read = written = PAGE
    for item in placed:
        elements = min(_step_elements(item, step_bytes), item.tensor.num_elements)
        for dtype in {piece.record.dtype for piece in item.tensor.pieces}:
            read = max(read, elements * ITEM_BYTES[dtype])
            written = max(written, elements * ITEM_BYTES[item.type])
    return read, written


def _unit(tensor: PlannedTensor) -> int:
    """The elements that can only be converted together: a head, where its halves are interleaved."""
    return tensor.num_elements // tensor.permute_heads if tensor.permute_heads else 1


def _step_elements(placed: Placed, step_bytes: int) -> int:
    """Elements of a step: whole units and, unless that takes too much memory, whole pages."""
    unit = _unit(placed.tensor)
    page = PAGE // ITEM_BYTES[placed.type]
    whole = math.lcm(unit, page)
    most = step_bytes // 4  # as float32
    if whole <= most:
        return most // whole * whole
    return whole if whole <= 4 * most else max(unit, most // unit * unit)


def _steps(placed: Placed, step_bytes: int) -> Iterator[_Step]:
    item_bytes = ITEM_BYTES[placed.type]
    size = _step_elements(placed, step_bytes)
    pieces = placed.tensor.pieces
    # pages can be written whole where each step begins on one; the last step may fill its page with zeros
    steps_aligned = len(pieces) == 1 or all(
        piece.num_elements * item_bytes % PAGE == 0 for piece in pieces[:-1]
    )
    aligned = placed.offset % PAGE == 0 and size * item_bytes % PAGE == 0 and steps_aligned
    offset = placed.offset
    for number, piece in enumerate(pieces):
        for first in range(0, piece.num_elements, size):
            elements = min(size, piece.num_elements - first)
            last = number == len(pieces) - 1 and first + elements == piece.num_elements
            yield _Step(placed, piece.record, piece.first + first, elements, offset, aligned, last)
            offset += elements * item_bytes


def _each_done(threads: int, work: Callable[[_Step], int], steps: Iterator[_Step]) -> Iterator[int]:
    """The results of `work` on each step as they come; an error stops the steps that have not begun."""
    with ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(work, step) for step in islice(steps, 2 * threads)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                running |= {pool.submit(work, step) for step in islice(steps, len(done))}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """Does steps; each thread has its own two buffers."""

    def __init__(self, target: TargetFile, sources: dict[Path, SourceFile], sizes: tuple[int, int]):
        self._target = target
        self._sources = sources
        self._sizes = sizes
        self._local = threading.local()

    def _buffers(self) -> tuple[AlignedBuffer, AlignedBuffer]:
        if not hasattr(self._local, "buffers"):
            read, written = self._sizes
            self._local.buffers = AlignedBuffer(read + 2 * PAGE), AlignedBuffer(written + PAGE)
        return self._local.buffers

    def do(self, step: _Step) -> int:
        """Returns the bytes written."""
        record, kind = step.record, step.placed.type
        read, write = self._buffers()
        item = ITEM_BYTES[record.dtype]
        try:
            found = self._sources[record.path].read(
                record.offset + step.first * item, step.num_elements * item, read
            )
        except OSError as error:
            raise ModelFileError(f"{record.path}: cannot be read: {error.strerror}.") from error
        source = np.frombuffer(found, STORAGE[record.dtype])
        num_bytes = step.num_elements * ITEM_BYTES[kind]
        target = np.frombuffer(write.view[:num_bytes], STORAGE[kind])
        self._convert(step, source, target)
        end = -(-num_bytes // PAGE) * PAGE if step.aligned and step.last else num_bytes
        write.view[num_bytes:end] = bytes(end - num_bytes)
        self._target.write(step.offset, write.view[:end], direct=step.aligned)
        return num_bytes

    def _convert(self, step: _Step, source: np.ndarray, target: np.ndarray) -> None:
        tensor, kind, dtype = step.placed.tensor, step.placed.type, step.record.dtype
        try:
            if tensor.permute_heads:
                columns = math.prod(tensor.shape[1:])
                rows = tensor.shape[0] // tensor.permute_heads
                if dtype != kind:
                    ordered = np.empty(source.size, source.dtype)
                    interleave_halves(source, ordered, rows, columns)
                    convert(ordered, dtype, target, kind, tensor.add)
                else:
                    interleave_halves(source, target, rows, columns)
            else:
                convert(source, dtype, target, kind, tensor.add)
        except OutOfRange as error:
            raise OutOfRange(
                f"{step.record.path}: tensor {step.record.name!r} {error}. Export to BF16 or F32 with "
                "--quant."
            ) from None

    def write_values(self, placed: Placed) -> int:
        """A small tensor that is in memory; returns the bytes written."""
        data = placed.tensor.values.astype("<f4").tobytes()
        self._target.write(placed.offset, memoryview(data), direct=False)
        return len(data)
