"""Where ONNX Runtime has mapped the weights of a session: found in the process's list of mappings.

ONNX Runtime maps each external tensor on its own, so an address is known by the offset in the file. But where
two mappings happen to lie side by side in memory as in the file, the kernel shows them as one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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

    @property
    def num_pages(self) -> int:
        return self.nbytes // mmap.PAGESIZE


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


def without(found: Iterable[Mapping], others: Sequence[Mapping]) -> list[Mapping]:
    """What `found` covers and `others` do not."""
    left = list(found)
    for other in others:
        left = [part for mapping in left for part in _cut_out(mapping, other)]
    return left


def _cut_out(mapping: Mapping, other: Mapping) -> Iterator[Mapping]:
    end, other_end = mapping.address + mapping.nbytes, other.address + other.nbytes
    for start, stop in ((mapping.address, min(end, other.address)), (max(mapping.address, other_end), end)):
        if start < stop:
            yield Mapping(start, mapping.offset + start - mapping.address, stop - start)


def as_made(found: Iterable[Mapping], ranges: Iterable[tuple[int, int]]) -> list[Mapping]:
    """Each mapping by itself, in order of offsets: `ranges` are the (offset, bytes) that may have been mapped.

    What they do not explain stays as it was found.
    """
    left = Counter(ranges)
    parts = []
    for mapping in found:
        sizes = _tiling(mapping.offset, mapping.offset + mapping.nbytes, left) or [mapping.nbytes]
        address, offset = mapping.address, mapping.offset
        for nbytes in sizes:
            parts.append(Mapping(address, offset, nbytes))
            left[offset, nbytes] -= 1
            address, offset = address + nbytes, offset + nbytes
    return sorted(parts, key=lambda mapping: (mapping.offset, mapping.nbytes, mapping.address))


def _tiling(start: int, end: int, left: Counter) -> list[int] | None:
    """Sizes of ranges that fill [start, end) one behind the other."""
    if start == end:
        return []
    for offset, nbytes in sorted(left, reverse=True):  # large ones first
        if offset == start and left[offset, nbytes] > 0 and start + nbytes <= end:
            rest = _tiling(start + nbytes, end, left)
            if rest is not None:
                return [nbytes, *rest]
    return None


def drop(mapping: Mapping) -> None:
    """Let go of pages that were read; they come back from the file when they are touched."""
    _advise(mapping, mmap.MADV_DONTNEED)


def advise_random(mapping: Mapping) -> None:
    """From now on a page that is touched is read alone, without what lies around it."""
    _advise(mapping, mmap.MADV_RANDOM)


def _advise(mapping: Mapping, advice: int) -> None:
    code = ctypes.CDLL(None, use_errno=True).madvise(
        ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.nbytes), ctypes.c_int(advice)
    )
    if code != 0:
        raise OSError(ctypes.get_errno(), "the system took no advice on a mapping")


def is_touched(mapping: Mapping) -> bool:
    """Whether this process has touched a page of the mapping since it was made or dropped."""
    with open(_PAGEMAP, "rb", buffering=0) as pages:
        pages.seek(mapping.address // mmap.PAGESIZE * 8)
        entries = memoryview(pages.read(mapping.num_pages * 8)).cast("Q")
    return any(entry & _PRESENT for entry in entries)


def give_back_memory() -> None:
    """What was freed while a session was made goes back to the system; the next one would not find it all
    again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
