"""Where ONNX Runtime has mapped the weights of a session: found in the process's list of mappings.

ONNX Runtime maps each external tensor on its own, so an address is known by the offset in the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = 1 << 63


@dataclass(frozen=True)
class Mapping:
    """`nbytes` at `address` are those of a file from `offset` on; whole pages, the last of which may reach
    past its end.
    """

    address: int
    offset: int
    nbytes: int


def mappings(path: str | os.PathLike) -> list[Mapping]:
    """This process's mappings of the file at `path`, in order of their offset in it."""
    about = os.stat(path)
    device, inode = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}", str(about.st_ino)
    return sorted(_matching(device, inode), key=lambda mapping: (mapping.offset, mapping.address))


def _matching(device: str, inode: str) -> Iterator[Mapping]:
    with open(_MAPS) as lines:
        for line in lines:
            addresses, _, offset, found_device, found_inode, *_ = line.split(maxsplit=5)
            if found_device == device and found_inode == inode:
                start, end = (int(address, 16) for address in addresses.split("-"))
                yield Mapping(start, int(offset, 16), end - start)


def drop(mapping: Mapping) -> None:
    """Let go of pages that were read; they come back from the file when they are touched."""
    code = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.nbytes), ctypes.c_int(mmap.MADV_DONTNEED)
    )
    if code != 0:
        raise OSError("pages of a mapping could not be dropped")


def is_touched(mapping: Mapping) -> bool:
    """Whether this process has touched a page of the mapping since it was made or dropped."""
    with open(_PAGEMAP, "rb", buffering=0) as pages:
        pages.seek(mapping.address // mmap.PAGESIZE * 8)
        entries = memoryview(pages.read(mapping.nbytes // mmap.PAGESIZE * 8)).cast("Q")
    return any(entry & _PRESENT for entry in entries)


def give_back_memory() -> None:
    """What was freed while a session was made goes back to the system; the next one would not find it all
    again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
