"""What a prepared model depends on: the bytes of the model, this processor, this ONNX Runtime, and how it
was prepared.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from edgeinfer.remembered import remembered

_CHUNK_BYTES = 4 << 20


def entry_key(paths: Sequence[Path], *options: object) -> str:
    """The name of a cache entry: 32 hexadecimal digits. `options`: plain values that the preparation
    depends on.
    """
    parts = [ort.__version__, processor(), [content_digest(path) for path in paths], list(options)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def content_digest(path: Path) -> str:
    """SHA-256 of the file, read once: afterwards its identity, size and times tell that it is the same."""
    about = os.stat(path)
    times = about.st_mtime_ns, about.st_ctime_ns
    identity = f"sha256 {about.st_dev} {about.st_ino} {about.st_size} {times}"
    return remembered(identity, lambda: _digest(path), kind=str)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        offset = 0
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if hasattr(os, "posix_fadvise"):  # read once: it need not stay in the page cache
                os.posix_fadvise(file.fileno(), offset, len(chunk), os.POSIX_FADV_DONTNEED)
            offset += len(chunk)
    return digest.hexdigest()


def processor() -> str:
    """What the kernels are chosen by: the machine and the instructions that its processor states."""
    flags = ""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features", "model", "CPU part"):
                    flags += name.strip() + " ".join(sorted(value.split()))
                elif not line.strip():  # the first one stands for all
                    break
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"
