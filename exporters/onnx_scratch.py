"""A file for data that is made before the export is written, so that it need not stay in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgeinfer.exporters.onnx_weights import FilePart

_ALIGNMENT = 64


class Stream:
    """Data written in parts, one after the other; `source` is where all of it lies, known at the end."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.blake2b(digest_size=32)
        self.source: FilePart | None = None

    def write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        self._digest.update(data)
        self._file.write(data)

    @property
    def digest(self) -> bytes:
        return self._digest.digest()


class Scratch:
    """The file `path`, made anew; whoever made its folder removes it. Equal data is kept once."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "wb")
        self._known: dict[bytes, FilePart] = {}

    def add(self, array: np.ndarray) -> FilePart:
        with self.stream() as stream:
            stream.write(array)
        return stream.source

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """One at a time."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        start = self._file.tell()
        stream = Stream(self._file)
        yield stream
        part = FilePart(self.path, start, self._file.tell() - start)
        stream.source = self._known.setdefault(stream.digest, part)
        if stream.source is not part:
            self._file.seek(start)
            self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
