"""How fast the disk under a file really reads, the way the pager reads it. Every plan rests on this number."""

from __future__ import annotations

import os
import time

from edgeinfer.remembered import remembered

_MIB = 1 << 20
_BLOCK_BYTES = 4 * _MIB
_RING_BYTES = 16 * _MIB
MEASURE_SECONDS = 0.4


def disk_bytes_per_second(path: str | os.PathLike, again: bool = False) -> float:
    """Bytes per second that large direct reads get from the disk under `path`; kept per device.

    `again` measures anew: a disk may be busy, a laptop may save power.
    """
    device = os.stat(path).st_dev
    return remembered(f"disk {device}", lambda: measure(path), again, kind=float)


def measure(path: str | os.PathLike, seconds: float = MEASURE_SECONDS) -> float:
    """Read blocks from all over the file at `path` for about `seconds` and give the bytes per second."""
    from edgeinfer import _native

    size = os.stat(path).st_size
    count = max(1, size // _BLOCK_BYTES)
    length = min(size, _BLOCK_BYTES)
    # A stride through the whole file: neighbours would flatter disks that read ahead.
    stride = next(step for step in range(max(1, count * 5 // 8), count + 1) if _coprime(step, count))
    blocks = [(0, 1, (i * stride % count) * _BLOCK_BYTES, length, 0) for i in range(count)]
    pager = _native.Pager([(os.fspath(path), True)], blocks, range(count), _native.Arena(_RING_BYTES), _MIB, 4)
    try:
        start = time.perf_counter()
        done = 0
        pager.begin_pass()
        while time.perf_counter() - start < seconds or done == 0:
            pager.acquire(done % count)
            pager.release()
            done += 1
        # What was read ahead arrived in the same time.
        return pager.statistics()["read_bytes"] / (time.perf_counter() - start)
    finally:
        pager.close()


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
