"""Tensors of an ONNX file: their type and shape, and where their bytes are. Strict, for files are not to
be trusted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeinfer.errors import ModelFileError
from edgeinfer.onnx.wire import BYTES, VARINT, Field, fields, packed, signed

#: TensorProto.DataType -> (name, bits of an element)
TYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 8: ("string", 0), 9: ("bool", 8), 10: ("float16", 16),
    11: ("float64", 64), 12: ("uint32", 32), 13: ("uint64", 64), 14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16), 17: ("float8e4m3fn", 8), 18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8), 21: ("uint4", 4), 22: ("int4", 4), 23: ("float4e2m1", 4),
    24: ("float8e8m0", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
_NAME, _RAW, _EXTERNAL, _LOCATION = 8, 9, 13, 14
_LITTLE_ENDIAN_ARRAYS = {
    4: 1,
    10: 11,
}  # field with packed floats or doubles -> data type whose raw bytes they are


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes lie. `offset` None: written as numbers or text inside the graph, not as
    bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int | None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_tensor(
    data: memoryview, start: int, end: int, model: Path, locate: Callable[[str, str], Path]
) -> StoredTensor:
    """The TensorProto in data[start:end] of the file `model`. `locate(location, name)` gives the path of
    external data.

    ModelFileError where bytes are missing, too few or too many.
    """
    name, type_number, shape, raw, in_place, external = "", 0, [], None, None, {}
    is_external = False
    for field in fields(data, start, end):
        if field.number == 1:
            shape += [signed(size) for size in packed(data, field)]
        elif field.number == 2 and field.kind == VARINT:
            type_number = field.number_value
        elif field.number == _NAME and field.kind == BYTES:
            name = text(data, field)
        elif field.number == _RAW and field.kind == BYTES:
            raw = field
        elif field.number in _LITTLE_ENDIAN_ARRAYS and field.kind == BYTES:
            in_place = field
        elif field.number == _EXTERNAL and field.kind == BYTES:
            key, value = _entry(data, field)
            external[key] = value
        elif field.number == _LOCATION and field.kind == VARINT:
            is_external = field.number_value == 1
    if type_number not in TYPES or any(size < 0 for size in shape):
        raise ModelFileError(
            f"{model}: tensor {name!r} has the unknown type {type_number} or a negative size: {shape}."
        )
    type_name, bits = TYPES[type_number]
    nbytes = -(-math.prod(shape) * bits // 8)
    if is_external:
        path, offset = _external(external, name, nbytes, model, locate)
        return StoredTensor(name, type_name, tuple(shape), nbytes, path, offset)
    offset = None
    if raw is None and in_place is not None and _LITTLE_ENDIAN_ARRAYS[in_place.number] == type_number:
        raw = in_place
    if raw is not None:
        offset = raw.start
        if raw.end - raw.start != nbytes:
            raise ModelFileError(
                f"{model}: tensor {name!r}: expected {nbytes} bytes for {type_name} {shape}, found "
                f"{raw.end - raw.start}."
            )
    return StoredTensor(name, type_name, tuple(shape), nbytes, model, offset)


def _external(
    entries: dict[str, str], name: str, nbytes: int, model: Path, locate: Callable[[str, str], Path]
) -> tuple[Path, int]:
    path = locate(entries.get("location", ""), name)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", nbytes))
    except ValueError:
        offset = length = -1
    if offset < 0 or length != nbytes:
        raise ModelFileError(
            f"{model}: tensor {name!r}: expected {nbytes} bytes of external data at an offset of 0 or more, "
            "found "
            f"length {entries.get('length', 'not stated')!r} and offset {entries.get('offset', '0')!r}."
        )
    size = path.stat().st_size
    if offset > size or nbytes > size - offset:
        raise ModelFileError(
            f"{path} is too short: tensor {name!r} needs bytes {offset} to {offset + nbytes}, the file has "
            f"{size}. "
            "Download or copy it again."
        )
    return path, offset


class Folder:
    """The files beside a model that its tensors may name: relative, and not outside the model's folder."""

    def __init__(self, model: Path):
        self._model = model
        self._known: dict[str, Path] = {}

    def locate(self, location: str, tensor: str) -> Path:
        """The file that `tensor` names. ModelFileError where it may not name it, or where it is missing."""
        if location not in self._known:
            self._known[location] = self._check(location, tensor)
        return self._known[location]

    def _check(self, location: str, tensor: str) -> Path:
        parts = PurePosixPath(location.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in location:
            raise ModelFileError(
                f"{self._model}: tensor {tensor!r} wants its data from {location!r}, which is not a file "
                "inside the "
                "model's folder. Such a model is not opened."
            )
        path = self._model.parent.joinpath(*parts)
        if not path.is_file():
            raise ModelFileError(
                f"{path} is missing: tensor {tensor!r} of {self._model.name} is in it. Put it beside the "
                "model."
            )
        if not self._is_inside(path):
            raise ModelFileError(
                f"{self._model}: tensor {tensor!r} wants its data from {location!r}, a link to "
                f"{path.resolve()}, "
                "outside the model's folder. Such a model is not opened."
            )
        return path

    def _is_inside(self, path: Path) -> bool:
        """Caches of downloads hold links: then the model is a link into the same folder as its data."""
        real = path.resolve()
        homes = {self._model.parent.resolve(), self._model.resolve().parent}
        return any(os.path.commonpath([real, home]) == str(home) for home in homes)


def _entry(data: memoryview, field: Field) -> tuple[str, str]:
    key = value = ""
    for part in fields(data, field.start, field.end):
        if part.kind == BYTES and part.number == 1:
            key = text(data, part)
        elif part.kind == BYTES and part.number == 2:
            value = text(data, part)
    return key, value


def text(data: memoryview, field: Field) -> str:
    return bytes(data[field.start : field.end]).decode("utf-8", "replace")
