"""Positioned reads and writes past the page cache where the file system allows it, else through it.

A model is read and written once: in the page cache it would only push out what others need, and writing
through it is slower than the disk.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)


class AlignedBuffer:
    """`size` bytes that start on a page, as O_DIRECT wants them."""

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, max(PAGE, -(-size // PAGE) * PAGE))
        self.view = memoryview(self._map)

    def __len__(self) -> int:
        return len(self.view)


class SourceFile:
    """A file to read from at any place: from the page cache what is there already, the rest past it."""

    def __init__(self, path: Path):
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = _open_direct(path, os.O_RDONLY)

    def read(self, offset: int, size: int, buffer: AlignedBuffer) -> memoryview:
        """`size` bytes from `offset` on, somewhere in `buffer`, which must have room for two pages more.

        Raises OSError, also where the file is shorter.
        """
        if self._direct is not None:
            found = self._cached(offset, size, buffer) or self._uncached(offset, size, buffer)
            if found is not None:
                return found
        if not _fill(self._handle, buffer.view[:size], offset, size):
            raise OSError(errno.EIO, "the file became shorter", str(self._path))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, offset, size, os.POSIX_FADV_DONTNEED)
        return buffer.view[:size]

    def _cached(self, offset: int, size: int, buffer: AlignedBuffer) -> memoryview | None:
        """None where a part is not in the page cache."""
        if not _NO_WAIT:
            return None
        try:
            complete = os.preadv(self._handle, [buffer.view[:size]], offset, _NO_WAIT) == size
        except OSError:  # nothing is there, or the file system cannot tell
            return None
        return buffer.view[:size] if complete else None

    def _uncached(self, offset: int, size: int, buffer: AlignedBuffer) -> memoryview | None:
        """Whole pages around the bytes; None where the file system wants other ones."""
        start = offset % PAGE
        length = -(-(start + size) // PAGE) * PAGE
        try:
            if not _fill(self._direct, buffer.view[:length], offset - start, start + size):
                return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        return buffer.view[start : start + size]

    def close(self) -> None:
        os.close(self._handle)
        if self._direct is not None:
            os.close(self._direct)


def _fill(handle: int, view: memoryview, offset: int, needed: int) -> bool:
    """Read `needed` bytes at least into `view`, which may have room for more; whether they came."""
    done = 0
    while done < needed:
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


class TargetFile:
    """An existing file to write to at any place; what is left out reads as zeros."""

    def __init__(self, path: Path, size: int):
        self._handle = os.open(path, os.O_RDWR)
        self._direct = _open_direct(path, os.O_RDWR)
        os.ftruncate(self._handle, size)

    def write(self, offset: int, view: memoryview, direct: bool) -> None:
        """Write all of `view`. `direct`: place, length and address of `view` are whole pages."""
        if direct and self._direct is not None:
            try:
                self._write(self._direct, offset, view)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self._write(self._handle, offset, view)

    @staticmethod
    def _write(handle: int, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(handle, view[done:], offset + done)

    def close(self) -> None:
        os.close(self._handle)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path, flags: int) -> int | None:
    """None where the system or the file system has no O_DIRECT."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, flags | _DIRECT)
    except OSError:
        return None
