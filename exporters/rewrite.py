"""A GGUF file written anew from another: its metadata byte by byte, its tensors in any order and place.

Reads run ahead of the writes through a few buffers. Pages of both files are given back to the system on the
way, so that a file larger than the memory does not push everything else out of the page cache.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgeinfer.errors import ModelFileError
from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer, TargetFile
from edgeinfer.ggml_types import GGML_TYPES
from edgeinfer.gguf_header import read_header
from edgeinfer.gguf_window import open_regular
from edgeinfer.modelfile import ModelFile, TensorInfo

_READ_BUFFERS = 4
NUM_BUFFERS = _READ_BUFFERS + 1  # of all, one to write from
_ALIGNMENT = "general.alignment"
_SPLIT = ("split.no", "split.count", "split.tensors.count")  # a split model becomes one file
_TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
_U32_TYPE = 4


@dataclass(frozen=True)
class Placed:
    """A tensor of the new file: `slices` equal parts of each of `sources` in turn (1: the whole of the
    first).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...]
    slices: int = 1

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


@dataclass(frozen=True)
class _Read:
    """`length` bytes at `offset` of part `part` of the source, for place `at` of a buffer."""

    part: int
    offset: int
    length: int
    at: int


def rewrite(
    file: ModelFile,
    tensors: Sequence[Placed],
    target: Path,
    *,
    alignment: int,
    buffer_bytes: int,
    progress: Callable[[float], None] | None = None,
) -> int:
    """Write `tensors` of `file` to the existing file `target` in this order, each at a multiple of
    `alignment`; gives the bytes written.

    Keys and values are those of the source's first part, in their order and to the byte, but for
    general.alignment and those that say that a model is split. Holds NUM_BUFFERS buffers of `buffer_bytes`.
    Raises ModelFileError where the source changes meanwhile.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(open_regular(path)) for path in file.paths]
        before = [_identity(part) for part in parts]
        header_bytes = sum(len(piece) for piece in _header_pieces(file, parts[0], tensors, alignment))
        total = sum(_padded(size, alignment) for size in (header_bytes, *(t.nbytes for t in tensors)))
        with closing(_Writer(target, total, buffer_bytes)) as writer:
            for piece in _header_pieces(file, parts[0], tensors, alignment):
                writer.write(piece)
            writer.pad(alignment)
            for tensor, buffer in _read_ahead(parts, tensors, buffer_bytes):
                if tensor is not None:
                    writer.pad(alignment)
                writer.write(buffer)
                if progress:
                    progress(writer.position / total)
            writer.pad(alignment)
            writer.flush()
        if [_identity(part) for part in parts] != before:
            raise ModelFileError(
                f"{file.paths[0]}: was changed while it was read. Leave it alone, and start again."
            )
        return writer.position


def rewritten_bytes(file: ModelFile, tensors: Sequence[Placed], alignment: int) -> int:
    """About how large the result of `rewrite` is: at most this."""
    data = sum(_padded(tensor.nbytes, alignment) for tensor in tensors)
    header = file.part_bytes[0] - sum(tensor.nbytes for tensor in file.tensors if tensor.part == 0)
    return data + header + 128 * len(tensors) + alignment


class _Writer:
    """Writes one after the other, past the page cache where the file system allows it: whole buffers, so
    whole pages.
    """

    def __init__(self, path: Path, size: int, buffer_bytes: int):
        self._file = TargetFile(path, size)
        self._buffer = AlignedBuffer(buffer_bytes)
        self._filled = self._written = 0

    @property
    def position(self) -> int:
        return self._written + self._filled

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            piece = left[: len(self._buffer) - self._filled]
            self._buffer.view[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            left = left[len(piece) :]
            if self._filled == len(self._buffer):
                self.flush()

    def pad(self, alignment: int) -> None:
        self.write(bytes(-self.position % alignment))

    def flush(self) -> None:
        whole = self._filled % PAGE == 0
        self._file.write(self._written, self._buffer.view[: self._filled], direct=whole)
        self._written, self._filled = self.position, 0

    def close(self) -> None:
        self._file.close()


def _header_pieces(
    file: ModelFile, source: BinaryIO, tensors: Sequence[Placed], alignment: int
) -> Iterator[bytes]:
    """All up to the padding before the first tensor:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    header = read_header(file.paths[0])
    ranges = {key: where for key, where in header.key_ranges.items() if key not in _SPLIT}
    ranges.setdefault(_ALIGNMENT, range(0))
    yield b"GGUF" + struct.pack("<IQQ", header.version, len(tensors), len(ranges))
    for key, where in ranges.items():
        if key == _ALIGNMENT:
            yield _string(key) + struct.pack("<II", _U32_TYPE, alignment)
        else:
            yield from _copied(source, where)
    offset = 0
    for tensor in tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        yield _string(tensor.name) + shape + struct.pack("<IQ", _TYPE_NUMBERS[tensor.type], offset)
        offset += _padded(tensor.nbytes, alignment)


def _copied(source: BinaryIO, where: range) -> Iterator[bytes]:
    for start in range(where.start, where.stop, 1 << 20):
        piece = bytearray(min(1 << 20, where.stop - start))
        _fill(source, start, memoryview(piece))
        yield bytes(piece)


def _read_ahead(
    parts: Sequence[BinaryIO], tensors: Sequence[Placed], buffer_bytes: int
) -> Iterator[tuple[Placed | None, memoryview]]:
    """(tensor that begins here or None, its next bytes), read by a thread while the caller writes what it got
    before.
    """
    buffers = [memoryview(bytearray(buffer_bytes)) for _ in range(_READ_BUFFERS)]
    ahead: deque[tuple[Placed | None, Future[memoryview]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        count = 0
        for tensor in tensors:
            begins: Placed | None = tensor
            for reads in _batches(tensor, buffer_bytes):
                if len(ahead) == _READ_BUFFERS - 1:  # the last one given out is still being written
                    started, done = ahead.popleft()
                    yield started, done.result()
                ahead.append((begins, pool.submit(_read_batch, parts, reads, buffers[count % _READ_BUFFERS])))
                begins, count = None, count + 1
        for started, done in ahead:
            yield started, done.result()


def _batches(tensor: Placed, capacity: int) -> Iterator[list[_Read]]:
    """What to read into one buffer after the other, so that the buffers hold the tensor's bytes in order."""
    sizes = [source.nbytes // tensor.slices for source in tensor.sources]
    group = sum(sizes)
    if group > capacity:
        for number in range(tensor.slices):
            for source, size in zip(tensor.sources, sizes):
                start = source.offset + number * size
                for done in range(0, size, capacity):
                    yield [_Read(source.part, start + done, min(capacity, size - done), 0)]
        return
    together = capacity // group
    for first in range(0, tensor.slices, together):
        reads, before = [], 0
        for source, size in zip(tensor.sources, sizes):  # source by source, so that the disk reads on
            for number in range(first, min(first + together, tensor.slices)):
                at = (number - first) * group + before
                reads.append(_Read(source.part, source.offset + number * size, size, at))
            before += size
        yield reads


def _read_batch(parts: Sequence[BinaryIO], reads: Sequence[_Read], buffer: memoryview) -> memoryview:
    for read in reads:
        _fill(parts[read.part], read.offset, buffer[read.at : read.at + read.length])
        _give_back(parts[read.part], read.offset, read.length)
    return buffer[: sum(read.length for read in reads)]


def _fill(source: BinaryIO, offset: int, view: memoryview) -> None:
    try:
        source.seek(offset)
        while view:
            count = source.readinto(view)
            if not count:
                raise ModelFileError(
                    f"{source.name}: became shorter while it was read. Leave it alone, and start again."
                )
            view = view[count:]
    except OSError as error:
        raise ModelFileError(f"{source.name}: cannot be read: {error.strerror}. Check the disk.") from error


def _give_back(file: BinaryIO, offset: int, length: int) -> None:
    """Whole pages inside the range only are dropped by Linux; other systems are left to themselves."""
    if length and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def _identity(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
