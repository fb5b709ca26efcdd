"""What kind of model a file is, by its content."""

from __future__ import annotations

import os

_IR_VERSION, _GRAPH = 0x08, 0x3A  # tags of ModelProto's first field, and of its graph (onnx.proto)
_TEXTS = frozenset((0x12, 0x1A, 0x22, 0x32, 0x42, 0x72))  # tags of its short fields that have a length
_MOST_IR_VERSION = 64


def model_kind(path: str | os.PathLike) -> str:
    """ "onnx" or "gguf". A file that is neither is left to the reader of its name's kind, which says so."""
    named = "onnx" if os.fspath(path).endswith(".onnx") else "gguf"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return named
    if start.startswith(b"GGUF"):
        return "gguf"
    return "onnx" if _begins_as_onnx(start) else named


def _begins_as_onnx(start: bytes) -> bool:
    """Whether it begins with the version that every writer of ONNX puts first, or with short fields and then
    a graph."""
    if len(start) >= 2 and start[0] == _IR_VERSION:
        return start[1] <= _MOST_IR_VERSION
    at = 0
    while at + 1 < len(start) and start[at] in _TEXTS and start[at + 1] < 128:
        at += 2 + start[at + 1]
    return at < len(start) and start[at] == _GRAPH
