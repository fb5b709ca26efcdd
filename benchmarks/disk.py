"""How fast the disk under a file reads past the page cache, with the reader that edgeinfer streams with."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
