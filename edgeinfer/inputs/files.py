"""Files that are given as inputs: opened, and told apart by their first bytes, not by their names."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import BinaryIO

from edgeinfer.errors import InputError

_MAGIC = (
    (b"\x93NUMPY", "npy"),
    (b"PK\x03\x04", "npz"),
    (b"PK\x05\x06", "npz"),
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"\xff\xd8\xff", "picture"),
)


def open_input(name: str) -> BinaryIO:
    """The file `name`, or for "-" all of standard input. Raises InputError."""
    if name == "-":
        return io.BytesIO(standard_input().read())
    if not name:
        raise InputError("The name of an input file is empty. Give --input [NAME=]FILE.")
    path = Path(name)
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder. Expected a file.")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"There is no input file {name}. Check the path.") from None
    except OSError as error:
        raise InputError(f"The input file {name} cannot be read: {error.strerror}.") from error


class InputFiles:
    """Opens files as `open_input` does, standard input again and again: it is read once, and kept."""

    def __init__(self) -> None:
        self._piped: bytes | None = None

    def __call__(self, name: str) -> BinaryIO:
        if name != "-":
            return open_input(name)
        if self._piped is None:
            self._piped = standard_input().read()
        return io.BytesIO(self._piped)


def standard_input() -> Pipe:
    if sys.stdin is None:
        raise InputError("There is no standard input to read. Name a file instead of -.")
    return Pipe(sys.stdin.fileno())


class Pipe:
    """Reads a file descriptor without a lock, so that a thread may still wait in it when the process ends."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._held = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end; they are read again."""
        while len(self._held) < size and (data := os.read(self._descriptor, size - len(self._held))):
            self._held += data
        return self._held[:size]

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer at the end; all that is left for -1."""
        parts, left = [], size
        while left:
            data = self._held or os.read(self._descriptor, 1 << 20 if size < 0 else left)
            self._held = b""
            if not data:
                break
            if size >= 0 and len(data) > left:
                data, self._held = data[:left], data[left:]
            parts.append(data)
            left -= len(data) if size >= 0 else 0
        return b"".join(parts)


def kind_of(file: BinaryIO) -> str:
    """ "npy", "npz", "picture" (PNG, JPEG), "sound" (WAV), or "bytes" for anything else."""
    start = file.read(12)
    file.seek(0)
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[:4] in (b"RIFF", b"RF64") and start[8:12] == b"WAVE":
        return "sound"
    return "bytes"
