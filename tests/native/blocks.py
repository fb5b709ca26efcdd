"""A file of random bytes and a pager over blocks of it; what it delivers is compared with the file."""

import ctypes
import random
from collections.abc import Sequence
from pathlib import Path

from edgeinfer import _native

PAGE = _native.PAGE_BYTES
RESIDENT, STREAMED, ROWS = 0, 1, 2


def write_random(path: Path, size: int, seed: int = 0) -> bytes:
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return data


def protection(address: int) -> str:
    """The protection of the page at an address, as /proc/self/maps shows it ("rw-p")."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[1]
    return "none"


class Paged:
    """`blocks`: (kind, offset, bytes); a block's home is at its offset in an arena as large as the file."""

    def __init__(
        self,
        path: Path,
        blocks: Sequence[tuple[int, int, int]],
        order: Sequence[int],
        ring: int = 0,
        direct: bool = True,
        chunk: int = 2 * PAGE,
        threads: int = 3,
    ):
        self.data = Path(path).read_bytes()
        self.blocks = list(blocks)
        self.order = list(order)
        self.space = _native.Arena(len(self.data) + 2 * PAGE)
        ring_arena = _native.Arena(ring) if ring else None
        described = [
            (0, kind, offset, size, 0 if kind == STREAMED else self.space.address + offset)
            for kind, offset, size in blocks
        ]
        self.pager = _native.Pager([(str(path), direct)], described, self.order, ring_arena, chunk, threads)

    def wanted(self, number: int) -> bytes:
        _, offset, size = self.blocks[number]
        return self.data[offset : offset + size]

    def home(self, number: int) -> bytes:
        _, offset, size = self.blocks[number]
        return ctypes.string_at(self.space.address + offset, size)

    def acquire(self, number: int) -> int:
        """The address of a block, after comparing its bytes."""
        address = self.pager.acquire(number)
        assert ctypes.string_at(address, self.blocks[number][2]) == self.wanted(number), f"block {number}"
        return address

    def run_pass(self, order: Sequence[int] | None = None) -> None:
        self.pager.begin_pass()
        for number in self.order if order is None else order:
            self.acquire(number)
            self.pager.release()
        self.pager.end_pass()

    def __enter__(self) -> "Paged":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pager.close()
