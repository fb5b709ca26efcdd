"""A file or folder that appears whole or not at all: written beside its place, renamed when it is done."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from edgeinfer.errors import ExportError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Target:
    """`with Target(path, force) as part:` gives a path to write to; leaving it without an error puts that in place.

    `folder`: a folder is made (and `part` is it); otherwise a file. An error, Ctrl-C too, removes what was written.
    Raises ExportError: the target exists and `force` is not given, its folder is missing or cannot be written to, and
    where the disk is full.
    """

    def __init__(self, path: str | os.PathLike, force: bool = False, folder: bool = False):
        self.path = Path(path)
        self._folder = folder
        self._check(force)
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")

    def _check(self, force: bool) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise ExportError(f"The folder for the result does not exist: {parent}. Make it first.")
        if self.path.is_dir() != self._folder and self.path.exists():
            wanted, found = ("folder", "file") if self._folder else ("file", "folder")
            raise ExportError(f"The result is a {wanted}, but a {found} is there: {self.path}. Give another -o.")
        if not force and os.path.lexists(self.path):
            raise ExportError(f"{self.path} exists already. Give another -o, or --force to replace it.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ExportError(f"No permission to write into {parent}. Choose another folder with -o.")

    def __enter__(self) -> Path:
        try:
            if self._folder:
                self._part.mkdir()
            else:
                self._part.touch(exist_ok=False)
        except OSError as error:
            raise ExportError(f"{self.path} cannot be written: {error.strerror}. Choose another -o.") from error
        return self._part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._put_in_place()
        except OSError as failure:
            error = failure
        finally:
            self._remove_part()
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise ExportError(
                f"The disk is full, or the file would be too large for it: {self.path} was not written "
                f"({error.strerror}). Free some space, or choose another -o."
            ) from error
        if kind is None and error is not None:
            raise ExportError(f"{self.path} could not be put in place: {error}.") from error

    def _put_in_place(self) -> None:
        if not self._folder:
            _flush(self._part)
            os.replace(self._part, self.path)
            return
        old = self._part.with_suffix(".old")
        if os.path.lexists(self.path):
            os.rename(self.path, old)
        try:
            os.rename(self._part, self.path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _remove_part(self) -> None:
        if self._part.is_dir():
            shutil.rmtree(self._part, ignore_errors=True)
        else:
            self._part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """A rename that survives a crash before the bytes do would leave a broken file under the good name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
