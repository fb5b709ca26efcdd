"""Prepared models in the user's cache folder: found by content, bounded in size, whole or not there at all.

An entry is a folder. It is made beside its place and renamed, under a lock, so that a crash leaves nothing
that looks done and two processes do not make the same one. Who uses an entry holds a shared lock on it, so it
is not removed. A seal in it tells whether its files are as they were made; one that is damaged is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeinfer.budget import format_size
from edgeinfer.errors import EngineError, ModelFileError
from edgeinfer.remembered import cache_folder

MANIFEST = "manifest.json"
SEAL = "seal.json"
SEALED_BYTES = 1 << 20  # files up to this size are read and compared at each use, larger ones by their size
MOST_BYTES = 64 << 30
FULL_BYTES = 64 << 20  # a disk with less free has no room for what could not be written
MOST_SHARE = 0.2  # of the disk
_SPARE = 0.05  # of what an entry needs


class Entry:
    """A prepared model that is in use: its folder stays until `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock: int | None = os.open(folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        # removed between the two, or damaged
        if os.fstat(self._lock).st_nlink == 0 or not _is_sealed(folder):
            self.close()
            raise FileNotFoundError(folder)
        with suppress(OSError):  # a folder that cannot be written is not made room in either
            os.utime(folder / MANIFEST)  # used now: others go first

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return folder_bytes(self.folder)

    def close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def root() -> Path:
    return cache_folder() / "onnx"


def find(key: str) -> Entry | None:
    """The entry of this key, in use from now on."""
    try:
        return Entry(root() / key)
    except OSError:
        return None


def find_or_make(key: str, needed_bytes: int, make: Callable[[Path], None]) -> Entry:
    """The entry of this key; where there is none, `make(folder)` fills an empty folder, a manifest too.

    `needed_bytes`: about what the entry will take. Older entries are removed for it. Raises EngineError where
    the disk has no room or the cache folder cannot be written.
    """
    found = find(key)
    if found is not None:
        return found
    try:
        root().mkdir(parents=True, exist_ok=True)
        with _making(key):
            found = find(key)  # another process may have made it meanwhile
            if found is not None:
                return found
            make_room(needed_bytes)
            return _make(key, make)
    except OSError as error:
        raise EngineError(
            f"The model cannot be prepared in {root()}: {error.strerror or error}. Make room there, or set "
            "XDG_CACHE_HOME to another folder, or give a larger --memory."
        ) from error


def _make(key: str, make: Callable[[Path], None]) -> Entry:
    for left in root().glob(f"{key}.*.part"):  # of one that crashed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: a child of one that was killed may still write into the other for a moment.
    place, beside = root() / key, root() / f"{key}.{secrets.token_hex(4)}.part"
    beside.mkdir()
    try:
        with _room_explained():
            make(beside)
        (beside / SEAL).write_text(json.dumps(_seal(beside)))
        for path in beside.iterdir():
            _flush(path)
        shutil.rmtree(place, ignore_errors=True)  # without a manifest, so no entry
        os.rename(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _flush(root())
    return Entry(place)


@contextmanager
def _room_explained() -> Iterator[None]:
    """Whatever says that nothing can be written says why, where others filled the disk meanwhile."""
    try:
        yield
    except (EngineError, ModelFileError) as error:
        free = shutil.disk_usage(root()).free
        if free >= FULL_BYTES:
            raise
        raise EngineError(
            f"The disk became full while the model was prepared in {root()}: {format_size(free)} are free. "
            "Make room there, or set XDG_CACHE_HOME to a folder on another disk."
        ) from error


def make_room(needed_bytes: int) -> None:
    """Remove entries that nobody uses, the one unused for longest first, until one of `needed_bytes` fits."""
    disk = shutil.disk_usage(root())
    most = min(MOST_BYTES, int(disk.total * MOST_SHARE))
    wanted = int(needed_bytes * (1 + _SPARE))
    entries = sorted(_entries(), key=lambda entry: entry[0])
    held = sum(size for _, size, _ in entries)
    for _, size, folder in entries:
        if held + needed_bytes <= most and shutil.disk_usage(root()).free >= wanted:
            return
        if remove(folder):
            held -= size
    free = shutil.disk_usage(root()).free
    if free < wanted:
        raise EngineError(
            f"Preparing the model takes about {format_size(wanted)} in {root()}, which has "
            f"{format_size(free)} free. "
            "Make room there, or set XDG_CACHE_HOME to a folder on another disk, or give a --memory that "
            "holds the model."
        )


def remove(folder: Path) -> bool:
    """Remove an entry, unless somebody uses it."""
    try:
        with _unused(folder / MANIFEST):
            (folder / MANIFEST).unlink()  # first: what is left of the rest is no entry
            shutil.rmtree(folder, ignore_errors=True)
            return True
    except OSError:
        return False


def _entries() -> list[tuple[float, int, Path]]:
    """(when it was used last, bytes, folder) of each. What a crash left is removed, unless somebody makes
    it."""
    found = []
    for folder in root().iterdir():
        try:
            if not folder.name.endswith(".part"):
                found.append(((folder / MANIFEST).stat().st_mtime, folder_bytes(folder), folder))
                continue
        except OSError:
            pass
        if folder.is_dir():
            with suppress(OSError), _making(folder.name.partition(".")[0], wait=False):
                shutil.rmtree(folder, ignore_errors=True)
    return found


def _seal(folder: Path) -> dict[str, list]:
    """{file: [bytes, SHA-256 of a small one, None of a large one]}"""
    sealed = {}
    for path in sorted(folder.iterdir()):
        if path.name != SEAL:
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= SEALED_BYTES else None
            sealed[path.name] = [size, digest]
    return sealed


def _is_sealed(folder: Path) -> bool:
    """Whether the files of an entry are those that were made."""
    try:
        return json.loads((folder / SEAL).read_text()) == _seal(folder)
    except (OSError, ValueError):
        return False


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


@contextmanager
def _making(key: str, wait: bool = True) -> Iterator[None]:
    """Inside, nobody else makes the entry of this key. The file of the lock goes with the lock."""
    path = root() / f"{key}.lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_nlink:  # else it went with its lock while this one waited
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Inside, nobody uses the entry of this manifest. OSError where somebody does."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
