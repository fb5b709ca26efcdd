"""How fast the disk under a file reads past the page cache, with reads like those of edgeinfer."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

from edgeinfer.modelfile import ModelFile

BLOCK_BYTES = 24 << 20  # about a large weight matrix
RING_BYTES = 192 << 20
CHUNK_BYTES = 1 << 20
READING_THREADS = 8
_STREAMED = 1  # block_kind of native/pager.h


def disk_bandwidth(path: str | os.PathLike, most_bytes: int = 2_500_000_000) -> float:
    """Bytes per second over the first `most_bytes` of `path`, read in order, each block given back at once.

    ValueError where the file is too small to tell, or where its file system refuses O_DIRECT.
    """
    from edgeinfer import _native

    count = min(Path(path).stat().st_size, most_bytes) // BLOCK_BYTES
    if count < 2:
        raise ValueError(
            f"expected a file of {2 * BLOCK_BYTES:,} bytes or more to measure with, found {path}"
        )
    ring = _native.Arena(RING_BYTES)
    memoryview(ring).cast("B")[::4096].tolist()  # touched before the clock starts
    blocks = [(0, _STREAMED, number * BLOCK_BYTES, BLOCK_BYTES, 0) for number in range(count)]
    started = time.perf_counter()
    pager = _native.Pager([(str(path), True)], blocks, list(range(count)), ring, CHUNK_BYTES, READING_THREADS)
    try:
        pager.begin_pass()
        for number in range(count):
            pager.acquire(number)
            pager.release()
        # Reading goes on over the end of the pass, so what was read counts, not what was asked for.
        seconds = time.perf_counter() - started
        statistics = pager.statistics()
        pager.end_pass()
    finally:
        pager.close()
    if not statistics["direct"]:
        raise ValueError(f"expected a file system with O_DIRECT, found none under {path}: use another --work")
    return statistics["read_bytes"] / seconds


def fresh_memory_seconds_per_gb(num_bytes: int = 1_000_000_000, threads: int = 2) -> float:
    """What the system takes to give memory that nobody holds: no model can be in memory sooner."""
    from edgeinfer import _native

    populate_write = 23  # MADV_POPULATE_WRITE, Linux 5.14
    libc = ctypes.CDLL(None, use_errno=True)
    share = num_bytes // threads // (2 << 20) * (2 << 20)
    arena = _native.Arena(share * threads)

    def touch(number: int) -> int:
        start = ctypes.c_void_p(arena.address + number * share)
        return libc.madvise(start, ctypes.c_size_t(share), populate_write)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        if any(pool.map(touch, range(threads))):
            raise OSError(ctypes.get_errno(), "memory could not be touched")
    return (time.perf_counter() - started) / (share * threads / 1e9)


class ExpertMeter:
    """Measures the disk between tokens with reads like those of missing experts: the same matrices of the same file,
    in random order, past the page cache, as many at a time. Holds one piece for each reading thread.
    """

    def __init__(self, file: ModelFile, threads: int = READING_THREADS, seed: int = 0):
        reads = list(expert_reads(file))
        random.Random(seed).shuffle(reads)
        self._reads = cycle(reads)
        self._size = max(size for _, _, size in reads)
        self._files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in file.paths]
        self._buffers = _touched_buffers(self._size, threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="meter")

    def read(self, most_bytes: int) -> float:
        """Read about so many bytes, at least one piece; bytes per second."""
        count = max(1, most_bytes // self._size)
        reads = [next(self._reads) for _ in range(count)]
        started = time.perf_counter()
        share = [reads[number :: len(self._buffers)] for number in range(len(self._buffers))]
        total = sum(self._threads.map(self._read, self._buffers, share))
        return total / (time.perf_counter() - started)

    def _read(self, buffer: memoryview, reads: Iterable[tuple[int, int, int]]) -> int:
        return sum(
            os.preadv(self._files[part], [buffer[:size]], offset) for part, offset, size in reads
        )

    def close(self) -> None:
        self._threads.shutdown()
        for file in self._files:
            os.close(file)
        self._buffers.clear()


def _touched_buffers(size: int, count: int) -> list[memoryview]:
    """Memory like that of the cache: in huge pages, where direct reads were up to twice as fast as in small ones."""
    from edgeinfer import _native

    huge_page = 2 << 20
    stride = -(-size // huge_page) * huge_page
    memory = memoryview(_native.Arena(stride * count)).cast("B")
    memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)
    return [memory[number * stride : number * stride + size] for number in range(count)]


def expert_reads(file: ModelFile) -> Iterable[tuple[int, int, int]]:
    """(part, offset, bytes) of the whole pages around every expert's matrices, in pieces of CHUNK_BYTES at most.

    ValueError for a model without experts.
    """
    page = mmap.PAGESIZE
    tensors = [tensor for tensor in file.tensors if tensor.num_experts]
    if not tensors:
        raise ValueError(f"expected a mixture of experts, found none in {file.paths[0]}")
    for tensor in tensors:
        each = tensor.nbytes // tensor.num_experts
        for start in range(tensor.offset, tensor.offset + tensor.nbytes, each):
            end = -(-(start + each) // page) * page
            for piece in range(start // page * page, end, CHUNK_BYTES):
                yield tensor.part, piece, min(CHUNK_BYTES, end - piece)
