"""A window that moves over the header of an untrusted GGUF file; each step is checked against its size.

The header is read, not mapped, because a mapped file that somebody truncates raises SIGBUS. Only about 1 MiB
of it is held at a time, more where one string is longer.
"""

import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

from edgeinfer.errors import ModelFileError

# Limits of this reader. The headers of the largest real files have about 30 MB.
MAX_HEADER_BYTES = 128 << 20
MAX_STRING_BYTES = 16 << 20

DAMAGED = "The file is damaged or was made by a faulty tool: download or convert it again."
U64 = struct.Struct("<Q")
_WINDOW_BYTES = 1 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; anything else is a ModelFileError or an OSError."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ModelFileError(f"{path}: there is no such file. Check the path of the model.") from None
    if stat.S_ISDIR(mode):
        raise ModelFileError(f"{path}: is a directory. Give the path of a .gguf file in it.")
    # O_NONBLOCK: if a pipe takes the file's place now, opening it must not wait for a writer.
    flags = (
        os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if stat.S_ISREG(mode):
        file = open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags))
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise ModelFileError(
        f"{path}: is a device, pipe or socket. A model must be a regular file: copy it to one."
    )


class Window:
    """The part of the file that is held, and the parser's position in it.

    `place` says what is being read, for the error messages. Every failure is a ModelFileError.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size
        self.base = 0  # file offset of data[0]
        self.data = b""
        self.pos = 0  # index in data
        self.place = "the header"

    @property
    def offset(self) -> int:
        return self.base + self.pos

    @property
    def left(self) -> int:
        return self.size - self.offset

    def fail(self, problem: str, advice: str = DAMAGED, offset: int | None = None) -> NoReturn:
        where = f"byte {self.offset if offset is None else offset}, {self.place}"
        raise ModelFileError(f"{self.path}: {problem} ({where}). {advice}")

    def need(self, num_bytes: int, what: str) -> None:
        """Bring the next `num_bytes` into the window, or fail if the file has not that many."""
        if num_bytes <= len(self.data) - self.pos:
            return
        if num_bytes > self.left:
            self.fail(
                f"truncated: {what} needs {num_bytes} bytes, but {max(0, self.left)} of {self.size} are left"
            )
        self.check_limit(num_bytes)
        wanted = min(max(num_bytes, _WINDOW_BYTES), self.left)
        self.base, self.pos = self.offset, 0
        self.file.seek(self.base)
        self.data = self.file.read(wanted) or b""
        while len(self.data) < num_bytes:
            more = self.file.read(wanted - len(self.data))
            if not more:
                self.fail(
                    "the file became shorter while it was read", "Do not change a model while it is in use."
                )
            self.data += more

    def check_limit(self, num_bytes: int) -> None:
        if self.offset + num_bytes > MAX_HEADER_BYTES:
            self.fail(
                f"the header is longer than {MAX_HEADER_BYTES >> 20} MiB, the most that edgeinfer reads"
            )

    def scalar(self, form: struct.Struct, what: str) -> int | float | bool:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.data, self.pos)
        self.pos += form.size
        return value

    def raw_string(self, what: str, limit: int) -> bytes:
        """A string as GGUF stores it: its length in bytes as u64, then the bytes."""
        start = self.offset
        length = self.scalar(U64, f"the length of {what}")
        if length > self.left:
            self.fail(f"truncated: {what} has {length} bytes, but {self.left} are left", offset=start)
        if length > limit:
            self.fail(f"{what} has {length} bytes, more than the {limit} allowed", offset=start)
        self.need(length, what)
        text = self.data[self.pos : self.pos + length]
        self.pos += length
        return text

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor's name: not empty, valid UTF-8, no zero byte (C code would cut it there)."""
        start = self.offset
        raw = self.raw_string(what, limit)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8: {raw[:40]!r}", offset=start)
        if not text or "\0" in text:
            self.fail(f"{what} is empty or has a zero byte in it: {raw[:40]!r}", offset=start)
        return text

    def skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.left:
            self.fail(f"truncated: {what} needs {num_bytes} bytes, but {self.left} of {self.size} are left")
        self.check_limit(num_bytes)
        self.pos += num_bytes

    def rewind(self, offset: int) -> None:
        self.base, self.data, self.pos = offset, b"", 0

    def skip_strings(self, count: int) -> None:
        """Walk over `count` strings, checking each length; 0.07 us a string, so the loop stays bare."""
        unpack = U64.unpack_from
        done = 0
        while done < count:
            self.need(8, "the length of a string")
            data, pos, length = self.data, self.pos, 0
            try:
                while done < count:
                    (length,) = unpack(data, pos)
                    pos += 8 + length
                    done += 1
            except (struct.error, OverflowError):
                pass  # the next string lies behind the window
            if self.base + pos > self.size:
                self.pos = pos - length - 8
                self.fail(
                    f"truncated: string {done} of {count} has {length} bytes, but {self.left - 8} are left"
                )
            self.pos = pos

    def skip_distinct_strings(self, count: int) -> None:
        """Walk over `count` strings, of which only empty ones may repeat."""
        unpack, seen = U64.unpack_from, set()
        data, pos, end = self.data, self.pos, len(self.data)
        for index in range(count):
            if pos + 8 > end or pos + 8 + (length := unpack(data, pos)[0]) > end:
                self.pos = pos
                text = self.raw_string("a string", MAX_STRING_BYTES)
                data, pos, end = self.data, self.pos, len(self.data)
            else:
                text = data[pos + 8 : pos + 8 + length]
                pos += 8 + length
            if text in seen and text:
                self.pos = pos - 8 - len(text)
                self.fail(f"element {index} is a duplicate: {text[:40].decode('utf-8', 'replace')!r}")
            seen.add(text)
        self.pos = pos
