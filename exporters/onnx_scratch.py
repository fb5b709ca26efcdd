"""A file for data that is made before the export is written, so that it need not stay in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeinfer.exporters.onnx_weights import FilePart

_ALIGNMENT = 64


class Stream:
    """Data written in parts, one after the other; `source` is where all of it lies, known at the end."""

    def __init__(self, scratch: Scratch):
        self._scratch = scratch
        self._start = scratch._place()
        self.source: FilePart | None = None

    def write(self, array: np.ndarray) -> None:
        self._scratch._file.write(memoryview(np.ascontiguousarray(array)).cast("B"))

    def _close(self) -> None:
        file = self._scratch._file
        file.flush()
        self.source = FilePart(self._scratch.path, self._start, file.tell() - self._start)


class Scratch:
    """The file `path`, made anew; whoever made its folder removes it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "wb")
        self._known: dict[bytes, FilePart] = {}

    def add(self, array: np.ndarray) -> FilePart:
        """Equal data is stored once."""
        digest = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=32).digest()
        if digest not in self._known:
            with self.stream() as stream:
                stream.write(array)
            self._known[digest] = stream.source
        return self._known[digest]

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """One at a time."""
        stream = Stream(self)
        yield stream
        stream._close()

    def _place(self) -> int:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
