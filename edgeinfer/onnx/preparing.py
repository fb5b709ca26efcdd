"""Starting the process that prepares a model, and seeing to it that it stays within the memory it may use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeinfer import errors

Progress = Callable[[float], None]

_LEAST_BYTES = 128 << 20  # without weights: an interpreter, ONNX Runtime, graphs
_LOOK_SECONDS = 0.05
#: What ONNX Runtime says where a whole graph is more than it can hold or write (2 GiB of weights that it has
# changed).
_TOO_LARGE = (
    "bad allocation",
    "bad_alloc",
    "Failed to allocate memory",
    "Protobuf serialization failed",
    "protobuf size",
)


def prepare_in_child(
    path: Path, folder: Path, stage_bytes: int, memory_bytes: int, progress: Progress = lambda _: None
) -> None:
    """See prepare.prepare; raises what it raises.

    Where optimizing the whole graph takes more than `memory_bytes`, or ONNX Runtime cannot do it, stages are
    optimized one by one.
    """
    try:
        _run(path, folder, stage_bytes, False, progress, max(_LEAST_BYTES, memory_bytes))
    except _Killed:
        for left in folder.iterdir():
            left.unlink()
        try:
            _run(path, folder, stage_bytes, True, progress, None)
        except _Killed:
            raise errors.BudgetError(
                f"{path} could not be prepared: the process that does it was killed, most likely for want of "
                "memory. "
                "Give a larger --memory."
            ) from None


class _Killed(Exception):
    """It took too much memory, or would have."""


def _run(
    path: Path, folder: Path, stage_bytes: int, piecewise: bool, progress: Progress, most_bytes: int | None
) -> None:
    request = json.dumps([os.fspath(path.absolute()), os.fspath(folder), stage_bytes, piecewise])
    command = [sys.executable, "-m", "edgeinfer.onnx.prepare", request]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said: dict = {}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as child:
        try:
            with _watched(child, most_bytes):
                for line in child.stdout:
                    said = json.loads(line)
                    if "progress" in said:
                        progress(said["progress"])
                problem = child.stderr.read()
                child.wait()
        except BaseException:
            child.kill()
            raise
    if "error" in said:
        if not piecewise and any(words in said["text"] for words in _TOO_LARGE):
            raise _Killed()
        raise getattr(errors, said["error"])(said["text"])
    if child.returncode == -signal.SIGKILL:
        raise _Killed()
    if child.returncode != 0 or not said.get("done"):
        lines = problem.strip().splitlines()
        how = f"its process ended with code {child.returncode}: {lines[-1] if lines else 'it said nothing'}"
        raise errors.EngineError(f"{path} could not be prepared: {how}")


@contextmanager
def _watched(child: subprocess.Popen, most_bytes: int | None) -> Iterator[None]:
    """Inside, the child is killed once it holds more than `most_bytes` that are not pages of files."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            if _anonymous_bytes(child.pid) > most_bytes:
                child.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    if most_bytes is not None:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if most_bytes is not None:
            watcher.join()


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
