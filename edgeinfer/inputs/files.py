"""Files that are given as inputs: opened, and told apart by their first bytes, not by their names."""

from __future__ import annotations

import io
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
    path = Path(name)
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder. Expected a file.")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"There is no input file {name}. Check the path.") from None
    except OSError as error:
        raise InputError(f"The input file {name} cannot be read: {error.strerror}.") from error


def standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise InputError("There is no standard input to read. Name a file instead of -.")
    return sys.stdin.buffer


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
