"""The file with a model's weights: written past the page cache, several tensors at a time."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import ExportError
from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer, TargetFile
from edgeinfer.exporters.onnx_weights import Source
from edgeinfer.exporters.parallel import THREADS

_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """Data and the byte of the file, a multiple of PAGE, where it goes; `name` is for errors."""

    name: str
    source: Source
    offset: int


def place(sources: Sequence[tuple[str, Source]]) -> list[Part]:
    """Each on pages of its own, in this order; equal ones once."""
    parts, end = {}, 0
    for name, source in sources:
        if source not in parts:
            parts[source] = Part(name, source, end)
            end += _pages(source.num_bytes)
    return list(parts.values())


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def write_parts(path: Path, parts: Sequence[Part], progress: Callable[[float], None] | None = None) -> None:
    """Write the parts to the new file `path`; zeros fill the last page of each.

    Some megabytes and what a source makes at a time are in memory, for each of a few threads. Raises OSError,
    and ExportError where a source gives more or less than it says.
    """
    size = max((part.offset + _pages(part.source.num_bytes) for part in parts), default=0)
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    path.touch()
    target = TargetFile(path, size)
    try:
        _Writer(target, size, progress).write(parts)
    finally:
        target.close()


class _Writer:
    def __init__(self, target: TargetFile, size: int, progress: Callable[[float], None] | None):
        self._target = target
        self._size = size
        self._progress = progress
        self._done = 0
        self._failed = False
        self._lock = threading.Lock()
        self._local = threading.local()

    def write(self, parts: Sequence[Part]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = [pool.submit(self._write_part, part) for part in parts]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                self._failed = True
                pool.shutdown(cancel_futures=True)
                raise

    def _write_part(self, part: Part) -> None:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = AlignedBuffer(_BUFFER_BYTES)
        view, filled, place = self._local.buffer.view, 0, part.offset
        for piece in part.source.pieces():
            while len(piece) and not self._failed:
                count = min(len(piece), len(view) - filled)
                view[filled : filled + count] = piece[:count]
                filled, piece = filled + count, piece[count:]
                if filled == len(view):
                    place, filled = self._flush(place, filled), 0
        written = place + filled - part.offset
        if written != part.source.num_bytes and not self._failed:
            raise ExportError(
                f"Tensor {part.name[:200]!r}: expected {part.source.num_bytes:,} bytes, its source gave "
                f"{written:,}. This is a fault of edgeinfer: please report it."
            )
        view[filled : _pages(filled)] = bytes(_pages(filled) - filled)
        self._flush(place, _pages(filled))

    def _flush(self, place: int, count: int) -> int:
        """Write what is in the buffer; the place behind it."""
        self._target.write(place, self._local.buffer.view[:count], direct=True)
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done / max(1, self._size))
        return place + count
