"""The header of a safetensors file; nothing it says is believed before it is known to be true.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length (little endian), the header
(JSON: name -> dtype, shape, data_offsets), then the data; the tensors cover it without a hole or an overlap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileError

#: dtype in a header -> bytes of an element.
ITEM_BYTES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSION = 1 << 62
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_AGAIN = "The file is damaged or was not downloaded completely: get it again."


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies: `num_bytes` bytes from byte `offset` of the file `path`, row after row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def read_records(path: Path) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file by name, in the order of their data. Reads the header only.

    Raises ModelFileError for a file that is missing, cut off, or whose header is not true.
    """
    try:
        size = path.stat().st_size
        header, start = _read_header(path, size)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise ModelFileError(f"{path}: the safetensors header is nested too deeply. {_AGAIN}") from None
    records = [_record(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"]
    _check_metadata(path, header.get("__metadata__", {}))
    records.sort(key=lambda record: (record.offset, record.num_bytes))
    _check_cover(path, records, start, size)
    return {record.name: record for record in records}


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header and the byte where the data starts."""
    if size < 8:
        raise ModelFileError(f"{path}: expected a safetensors file, found {size} bytes. {_AGAIN}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ModelFileError(
                f"{path}: the safetensors header says that it has {length:,} bytes, at most {_MAX_HEADER:,} "
                "are allowed. This is not a safetensors file, or it is damaged: get it again."
            )
        if length > size - 8:
            raise ModelFileError(
                f"{path}: the safetensors header says that it has {length:,} bytes, but {size - 8:,} follow. "
                f"{_AGAIN}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ModelFileError(f"{path}: the safetensors header cannot be read: {error}. {_AGAIN}") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise ModelFileError(f"{path}: the safetensors header is not a JSON object. {_AGAIN}")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} is there twice")
        result[name] = value
    return result


def _record(path: Path, name: str, entry: Any, start: int) -> TensorRecord:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_KEYS:
        raise ModelFileError(
            f"{where}: expected dtype, shape and data_offsets, found {str(entry)[:80]}. {_AGAIN}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelFileError(
            f"{where}: the dtype {str(dtype)[:40]!r} is unknown. Expected {', '.join(ITEM_BYTES)}."
        )
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise ModelFileError(f"{where}: the shape {str(shape)[:80]} is not a list of counts. {_AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(place) for place in offsets):
        raise ModelFileError(f"{where}: the data_offsets {str(offsets)[:80]} are not two counts. {_AGAIN}")
    begin, end = offsets
    expected = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise ModelFileError(
            f"{where}: {dtype} of shape {shape} takes {expected:,} bytes, but its data_offsets {offsets} "
            f"span {end - begin:,}. {_AGAIN}"
        )
    return TensorRecord(name, dtype, tuple(shape), path, start + begin, expected)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_DIMENSION


def _check_metadata(path: Path, metadata: Any) -> None:
    texts = isinstance(metadata, Mapping) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise ModelFileError(
            f"{path}: '__metadata__' of the safetensors header is not a map of texts. {_AGAIN}"
        )


def _check_cover(path: Path, records: list[TensorRecord], start: int, size: int) -> None:
    """`records` in order of their data: each begins where the one before ends, the last at the file's end."""
    place, before = start, None
    for record in records:
        if record.offset != place:
            fault = "overlaps" if record.offset < place else "leaves a hole after"
            neighbour = f"tensor {before.name!r}" if before else "the header"
            raise ModelFileError(f"{path}: the data of tensor {record.name!r} {fault} {neighbour}. {_AGAIN}")
        place, before = record.offset + record.num_bytes, record
    if place != size:
        raise ModelFileError(
            f"{path}: the safetensors header describes {place:,} bytes, but the file has {size:,}. {_AGAIN}"
        )
