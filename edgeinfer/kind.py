"""What kind of model a file is, by its first bytes."""

from __future__ import annotations

import os

#: First byte of a protobuf ModelProto: the tag of one of its fields (onnx.proto), ir_version as a rule.
_ONNX_TAGS = frozenset((0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72))


def model_kind(path: str | os.PathLike) -> str:
    """ "onnx" or "gguf". A file that cannot be read, or is neither, is left to the GGUF reader, which says
    so."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return "onnx" if os.fspath(path).endswith(".onnx") else "gguf"
    if start == b"GGUF":
        return "gguf"
    return "onnx" if start[:1] and start[0] in _ONNX_TAGS else "gguf"
