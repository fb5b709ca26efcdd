"""A file or folder that appears whole or not at all: written beside its place, renamed when it is done."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from edgeinfer.errors import ExportError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPLACED = "replaced"


class _Beside(ABC):
    """What is written goes to `_part`: a folder beside `path`, or a file alone in one, and is put in place when it
    is whole.

    The folder is locked as long as its process lives. One that a killed process left goes with the next run.
    """

    def __init__(self, path: str | os.PathLike, folder: bool):
        self.path = Path(path)
        self._folder = folder
        self._beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._part = self._beside if folder else self._beside / self.path.name
        self._lock: int | None = None

    @abstractmethod
    def _put_in_place(self) -> None:
        """Rename what was written; an OSError leaves what was there."""

    def __enter__(self) -> Path:
        _remove_abandoned(self.path)
        new = self._beside.with_suffix(".new")
        try:
            new.mkdir()
            self._lock = _locked(new)
            os.replace(new, self._beside)  # never there without its lock
            if not self._folder:
                self._part.touch(exist_ok=False)
        except OSError as error:
            self._remove_part()
            raise ExportError(
                f"{self.path} cannot be written: {error.strerror}. Choose another -o."
            ) from error
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
            raise _no_room(self.path, error) from error
        if kind is None and error is not None:
            raise ExportError(f"{self.path} could not be put in place: {error}.") from error

    def _remove_part(self) -> None:
        shutil.rmtree(self._beside, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Target(_Beside):
    """`with Target(path, force) as part:` gives a path to write to; leaving it without an error puts that in
    place.

    `folder`: a folder is made (and `part` is it); otherwise a file. An error, Ctrl-C too, removes what was
    written. Raises ExportError: the target exists and `force` is not given, its folder is missing or cannot
    be written to, and where the disk is full.
    """

    def __init__(self, path: str | os.PathLike, force: bool = False, folder: bool = False):
        super().__init__(path, folder)
        self._force = force
        self._check(force)

    def _check(self, force: bool) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise ExportError(f"The folder for the result does not exist: {parent}. Make it first.")
        if self.path.is_dir() != self._folder and self.path.exists():
            wanted, found = ("folder", "file") if self._folder else ("file", "folder")
            raise ExportError(
                f"The result is a {wanted}, but a {found} is there: {self.path}. Give another -o."
            )
        if self.path.exists() and not self.path.is_dir() and not self.path.is_file():
            raise ExportError(f"{self.path} is no file but a device or a pipe. Give another -o.")
        if not force:
            _refuse_existing(self.path)
        if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ExportError(f"No permission to write into {parent}. Choose another folder with -o.")

    def _put_in_place(self) -> None:
        if not self._force:
            _refuse_existing(self.path)  # another run may have been here first
        if not self._folder:
            _flush(self._part)
            os.replace(self._part, self.path)
            return
        old = self._beside.with_suffix(".old")
        if os.path.lexists(self.path):
            os.rename(self.path, old)
        try:
            os.rename(self._part, self.path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)


class TargetGroup(_Beside):
    """`with TargetGroup(path, others, force) as folder:` gives a folder; the files written there are put in
    place together, beside `path` and under their own names, `path` itself last.

    `replaced`: names that are this result's own: where it is replaced they go, even when no new ones come.
    `others`: names that other results may share (a tokenizer's): they may be there already with the same
    content. An error, Ctrl-C too, leaves what was there. Raises what Target raises, and ExportError where
    another file is in the way.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        force: bool = False,
        replaced: Iterable[str] = (),
        others: Iterable[str] = (),
    ):
        super().__init__(path, folder=True)
        self._force = force
        self._own = [self.path.name, *replaced]
        self._names = [*others, *reversed(self._own)]
        for name in self._own:
            Target(self.path.with_name(name), force)

    def _put_in_place(self) -> None:
        for name in () if self._force else self._own:
            _refuse_existing(self.path.with_name(name))
        names = [name for name in self._names if self._is_new(name)]
        for name in names:
            _flush(self._part / name)
        aside = self._part / _REPLACED
        aside.mkdir()
        moved: list[tuple[Path, Path]] = []
        try:
            # the model goes first and comes last: what is seen under its name is never half of one and half
            # of another
            for name in dict.fromkeys([self.path.name, *self._own, *names]):
                if os.path.lexists(self.path.with_name(name)):
                    moved.append(_move(self.path.with_name(name), aside / name))
            for name in names:
                moved.append(_move(self._part / name, self.path.with_name(name)))
        except OSError:
            for before, after in reversed(moved):
                os.rename(after, before)
            raise

    def _is_new(self, name: str) -> bool:
        new, old = self._part / name, self.path.with_name(name)
        if not new.exists():
            return False
        if name in self._own or not os.path.lexists(old):
            return True
        if old.is_file() and filecmp.cmp(new, old, shallow=False):
            return False
        if not self._force:
            raise ExportError(
                f"{old} is there already and belongs to another model. Give -o in a folder of its own, or "
                "--force."
            )
        return True


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ExportError(f"{path} exists already. Give another -o, or --force to replace it.")


def _move(before: Path, after: Path) -> tuple[Path, Path]:
    os.rename(before, after)
    return before, after


def _remove_abandoned(path: Path) -> None:
    """What killed processes left of `path`, unless it holds what was there before."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    try:
        left = [path.with_name(found) for found in os.listdir(path.parent) if name.fullmatch(found)]
    except OSError:
        return
    for folder in left:
        lock = _locked(folder)
        if lock is None:
            continue
        if not (folder / _REPLACED).exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock; None where another process has it, or there are no locks."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _no_room(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"The disk is full, or the file would be too large for it: {path} was not written "
        f"({error.strerror}). Free some space, or choose another -o."
    )


def _flush(path: Path) -> None:
    """A rename that survives a crash before the bytes do would leave a broken file under the good name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
