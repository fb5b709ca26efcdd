"""A memory cgroup of one's own (v1 or v2) to run a command in, and an empty page cache to start it from."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgeinfer import budget

# Enters the cgroup before the command replaces it, so that all that the command touches is counted there.
_ENTER = 'echo $$ > "$1" || exit 125; shift; exec "$@"'
_NOT_ENTERED = 125


class CgroupError(Exception):
    """A memory cgroup cannot be made or entered here."""


class MemoryCgroup:
    """A cgroup limited to `limit_bytes` of memory, without swap; a context manager that removes it again.

    CgroupError where this user may not make one.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.version, self.path = _make(f"edgeinfer-bench-{os.getpid()}-{time.monotonic_ns()}")
        try:
            self._limit()
        except OSError as error:
            self.remove()
            raise CgroupError(f"{self.path} cannot be limited: {error.strerror}") from error

    def _limit(self) -> None:
        if self.version == 2:
            (self.path / "memory.max").write_text(str(self.limit_bytes))
            swap, value = self.path / "memory.swap.max", "0"
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(self.limit_bytes))
            swap, value = self.path / "memory.memsw.limit_in_bytes", str(self.limit_bytes)
        if swap.exists():
            swap.write_text(value)

    def run(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess:
        """subprocess.run(command, **options) inside the cgroup. CgroupError if it cannot be entered."""
        wrapped = ["/bin/sh", "-c", _ENTER, "sh", str(self.path / "cgroup.procs"), *command]
        result = subprocess.run(wrapped, **options)
        if result.returncode == _NOT_ENTERED:
            raise CgroupError(f"a process cannot be put into {self.path}")
        return result

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel killed here for want of memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        for line in (self.path / name).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def remove(self) -> None:
        """Remove the cgroup, and what is still running in it."""
        for attempt in range(50):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                if attempt >= 5:
                    self._kill()
                time.sleep(0.1)

    def _kill(self) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.remove()


def _make(name: str) -> tuple[int, Path]:
    """(cgroup version, directory) of a new cgroup with a memory controller."""
    reasons = []
    for version, parent in _parents():
        path = parent / name
        try:
            path.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        limit = path / ("memory.max" if version == 2 else "memory.limit_in_bytes")
        if limit.exists() and os.access(limit, os.W_OK):
            return version, path
        path.rmdir()
        reasons.append(f"{parent}: its children have no memory controller")
    raise CgroupError("; ".join(reasons) or "no memory cgroup is mounted")


def _parents() -> Iterator[tuple[int, Path]]:
    """Where a cgroup may go: below this process's own, or higher (v2 wants no processes beside children)."""
    for version, root, directory in budget._memory_cgroups():
        while True:
            yield version, directory
            if directory == root or root not in directory.parents:
                break
            directory = directory.parent


def check_writable() -> None:
    """CgroupError, with the reasons, where `MemoryCgroup` would not work."""
    with MemoryCgroup(64 << 20) as cgroup:
        if cgroup.run(["/bin/true"]).returncode != 0:
            raise CgroupError(f"a process does not run in {cgroup.path}")


def drop_page_cache(files: Sequence[str | os.PathLike] = ()) -> bool:
    """Empty the page cache, or where that is not allowed what it holds of `files`. True: all was dropped."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def run_command(
    command: Sequence[str],
    limit_bytes: int | None,
    timeout: float,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[subprocess.CompletedProcess, int]:
    """Run `command` under a limit (None: without one): its result, with text output, and the OOM kills."""
    options = {"capture_output": True, "text": True, "timeout": timeout, "cwd": cwd, "env": environment}
    if limit_bytes is None:
        return subprocess.run(command, **options), 0
    with MemoryCgroup(limit_bytes) as cgroup:
        return cgroup.run(command, **options), cgroup.oom_kills
