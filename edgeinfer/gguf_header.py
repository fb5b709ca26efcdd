"""Reads the header of one GGUF file (v2 and v3, little endian) without trusting it; never reads weights.

Follows the checks of llama.cpp's gguf.cpp and adds limits: a hostile file costs little time and memory.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import ModelFileError
from edgeinfer.ggml_types import GGML_TYPES, REMOVED_TYPES
from edgeinfer.gguf_window import DAMAGED, MAX_STRING_BYTES, U64, Window, open_regular

# Limits of this reader. The largest real files have about 100 keys, 50,000 tensors and 900,000 tokens.
MAX_KEY_BYTES = 65535  # the format's own limit
MAX_KEYS = 65536
MAX_TENSORS = 1 << 17
MAX_TOKENS = 1 << 20
MAX_KEPT_ARRAY = 256

MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its final zero
MAX_DIMS = 4  # GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32

_INT64_MAX = (1 << 63) - 1
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, name, type, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # length, name, dimension count, type, offset
_U32 = struct.Struct("<I")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", _U32),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("u64", U64),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
#: What files that are not GGUF often start with, and what to do about each.
_OTHER_FORMATS = (
    (
        b"version https://git-lfs",
        "It is a Git LFS pointer, not the model: fetch the model with `git lfs pull`.",
    ),
    (b"<", "It looks like a web page, perhaps an error page saved by a download: download the model again."),
    (b"PK\x03\x04", "It is a zip archive or a PyTorch checkpoint: convert it to GGUF first."),
    (b"\x80\x02", "It is a PyTorch checkpoint: convert it to GGUF first."),
    (b"\0\0\0\0", "It starts with zeros, as an unfinished download does: download it again."),
) + tuple(
    (magic, "It is in a format that llama.cpp used before GGUF: download or convert a GGUF version.")
    for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
)

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GGUFArray:
    """An array in the metadata. `values` is None where it has more than 256 elements: checked, not kept."""

    element_type: str
    length: int
    values: tuple[Scalar, ...] | None


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as its file describes it; `offset` is absolute, `shape` in ggml's order (ne[0] first)."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of one file. `value_types` gives the stored type of each key: "u32", "str", "arr"...,
    `key_ranges` the bytes of the file that hold it with its value.
    """

    path: Path
    version: int
    metadata: dict[str, Scalar | GGUFArray]
    value_types: dict[str, str]
    key_ranges: dict[str, range]
    tensors: tuple[TensorRecord, ...]
    alignment: int
    file_bytes: int


def read_header(path: str | os.PathLike) -> GGUFHeader:
    """Read and check the header of one GGUF file. Raises ModelFileError that names the file and the place."""
    path = Path(os.fsdecode(path))
    if "\0" in str(path):
        raise ModelFileError(
            f"{str(path)!r}: is not a path: it has a zero byte in it. Check the path of the model."
        )
    try:
        with open_regular(path) as file:
            return _parse(Window(file, path, os.fstat(file.fileno()).st_size))
    except OSError as error:
        reason = error.strerror or error
        raise ModelFileError(
            f"{path}: cannot be read: {reason}. Check the path, its permissions and the disk."
        ) from error


def _parse(window: Window) -> GGUFHeader:
    if window.size == 0:
        raise ModelFileError(f"{window.path}: is empty. Expected a GGUF model: download or copy it again.")
    version = _read_version(window)
    num_tensors = window.scalar(U64, "the number of tensors")
    num_keys = window.scalar(U64, "the number of keys")
    _check_count(window, "keys", num_keys, MAX_KEYS, _MIN_KEY_BYTES)
    _check_count(window, "tensors", num_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES)
    metadata, value_types, key_ranges = _read_metadata(window, num_keys)
    alignment = _alignment(window, metadata, value_types)
    records = _read_tensors(window, num_tensors)
    window.place = "tensor data"
    data_offset = _pad(window.offset, alignment)
    tensors = _place_tensors(window, records, data_offset, alignment)
    return GGUFHeader(
        window.path, version, metadata, value_types, key_ranges, tensors, alignment, window.size
    )


def _read_version(window: Window) -> int:
    window.need(min(64, window.size), "the start of the file")
    start = window.data[:64]
    if start[:4] != b"GGUF":
        advice = next((advice for magic, advice in _OTHER_FORMATS if start.startswith(magic)), None)
        if advice is None and start[8:9] == b"{":
            advice = "It looks like a safetensors file: convert it to GGUF first."
        raise ModelFileError(
            f"{window.path}: is not a GGUF model: it starts with {start[:4]!r} instead of b'GGUF'. "
            + (advice or "Give a .gguf file, or convert the model to GGUF first.")
        )
    window.pos = 4
    version = window.scalar(_U32, "the version")
    if version in (2, 3):
        return version
    window.pos = 4
    if version and version & 0xFFFF == 0:
        window.fail(
            "is a big-endian GGUF file", "edgeinfer reads little-endian files only: convert it again."
        )
    if version == 1:
        window.fail(
            "is GGUF version 1, which llama.cpp no longer reads", "Download or convert a newer version."
        )
    newer = "This file may need a newer edgeinfer." if 3 < version < 100 else DAMAGED
    window.fail(f"has GGUF version {version}, expected 2 or 3", newer)


def _check_count(window: Window, what: str, count: int, limit: int, min_bytes: int) -> None:
    if count > window.left // min_bytes:
        window.fail(
            f"claims {count} {what}, but the {window.left} bytes left hold {window.left // min_bytes} at most"
        )
    if count > limit:
        window.fail(f"claims {count} {what}, more than the {limit} that edgeinfer reads")


def _read_metadata(
    window: Window, count: int
) -> tuple[dict[str, Scalar | GGUFArray], dict[str, str], dict[str, range]]:
    metadata: dict[str, Scalar | GGUFArray] = {}
    value_types: dict[str, str] = {}
    key_ranges: dict[str, range] = {}
    for index in range(count):
        window.place = f"key {index + 1} of {count}"
        start = window.offset
        key = window.name("the key", MAX_KEY_BYTES)
        if key in metadata:
            window.fail(f"duplicate key {key!r}", offset=start)
        window.place = f"key {key!r}"
        number = window.scalar(_U32, "the type of the value")
        value_types[key], metadata[key] = _read_value(window, number, key)
        key_ranges[key] = range(start, window.offset)
    return metadata, value_types, key_ranges


def _read_value(window: Window, number: int, key: str) -> tuple[str, Scalar | GGUFArray]:
    if number in _SCALARS:
        name, form = _SCALARS[number]
        return name, window.scalar(form, "the value")
    if number == _STRING:
        return "str", window.raw_string("the value", MAX_STRING_BYTES).decode("utf-8", "replace")
    if number == _ARRAY:
        return "arr", _read_array(window, key)
    window.fail(f"value type {number} is unknown, expected 0 to 12", offset=window.offset - 4)


def _read_array(window: Window, key: str) -> GGUFArray:
    number = window.scalar(_U32, "the type of the array's elements")
    if number != _STRING and number not in _SCALARS:
        nested = "an array of arrays, which llama.cpp does not read" if number == _ARRAY else "unknown"
        window.fail(f"element type {number} of an array is {nested}", offset=window.offset - 4)
    length = window.scalar(U64, "the length of the array")
    element_bytes = 8 if number == _STRING else _SCALARS[number][1].size
    if length > window.left // element_bytes:
        held = window.left // element_bytes
        window.fail(f"array claims {length} elements, but the {window.left} bytes left hold {held} at most")
    if number == _STRING:
        return GGUFArray("str", length, _read_strings(window, length, key))
    name, form = _SCALARS[number]
    if length > MAX_KEPT_ARRAY:
        window.skip(length * form.size, "the array")
        return GGUFArray(name, length, None)
    return GGUFArray(name, length, tuple(window.scalar(form, "an element") for _ in range(length)))


def _read_strings(window: Window, length: int, key: str) -> tuple[str, ...] | None:
    if key == "tokenizer.ggml.tokens":
        # llama.cpp ends the process (GGML_ASSERT) on a token that appears twice, so it is found here.
        if length > MAX_TOKENS:
            window.fail(f"vocabulary of {length} tokens, more than the {MAX_TOKENS} that edgeinfer reads")
        start = window.offset
        window.skip_distinct_strings(length)
        if length > MAX_KEPT_ARRAY:
            return None
        window.rewind(start)
    if length > MAX_KEPT_ARRAY:
        window.skip_strings(length)
        return None
    strings = (window.raw_string("a string", MAX_STRING_BYTES) for _ in range(length))
    return tuple(raw.decode("utf-8", "replace") for raw in strings)


def _alignment(window: Window, metadata: dict, value_types: dict[str, str]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    if value_types[key] != "u32" or value <= 0 or value & (value - 1):
        window.place = f"key {key!r}"
        window.fail(f"the alignment must be a u32 that is a power of two, found {value_types[key]} {value!r}")
    return value


def _read_tensors(window: Window, count: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """(name, type, shape, offset in the data section, nbytes) of each tensor, in the order of the file."""
    records, names = [], set()
    for index in range(count):
        window.place = f"tensor {index + 1} of {count}"
        start = window.offset
        name = window.name("the tensor's name", MAX_NAME_BYTES)
        if name in names:
            window.fail(f"duplicate tensor name {name!r}", offset=start)
        names.add(name)
        window.place = f"tensor {name!r}"
        shape = _read_shape(window)
        number = window.scalar(_U32, "the type")
        type_name, nbytes = _tensor_bytes(window, number, shape)
        records.append((name, type_name, shape, window.scalar(U64, "the offset"), nbytes))
    return records


def _read_shape(window: Window) -> tuple[int, ...]:
    num_dims = window.scalar(_U32, "the number of dimensions")
    if num_dims > MAX_DIMS:
        window.fail(f"{num_dims} dimensions, expected {MAX_DIMS} at most", offset=window.offset - 4)
    shape, elements = [], 1
    for axis in range(num_dims):
        size = window.scalar(U64, "a dimension")
        elements *= size
        if not 1 <= size <= _INT64_MAX:
            window.fail(f"dimension {axis} is {size}, expected 1 to {_INT64_MAX}", offset=window.offset - 8)
        if elements > _INT64_MAX:
            window.fail(f"dimensions {(*shape, size)} overflow: more than {_INT64_MAX} elements")
        shape.append(size)
    return tuple(shape)


def _tensor_bytes(window: Window, number: int, shape: tuple[int, ...]) -> tuple[str, int]:
    if number in REMOVED_TYPES:
        window.fail(
            f"type {REMOVED_TYPES[number]} was removed from llama.cpp",
            "Download or convert a version in another type, such as Q4_0 or Q4_K.",
        )
    if number not in GGML_TYPES:
        window.fail(
            f"type {number} is unknown, expected 0 to {max(GGML_TYPES)}",
            "The file is damaged, or needs a newer edgeinfer and llama.cpp.",
        )
    name, block_size, block_bytes = GGML_TYPES[number]
    row, elements = shape[0] if shape else 1, 1
    for size in shape:
        elements *= size
    if row % block_size:
        window.fail(f"rows of {row} elements are not a multiple of {block_size}, the block size of {name}")
    return name, elements // block_size * block_bytes


def _place_tensors(
    window: Window, records: list, data_offset: int, alignment: int
) -> tuple[TensorRecord, ...]:
    """Absolute offsets. Tensors must follow each other without gap or overlap, padded to the alignment."""
    tensors, expected, before = [], 0, "the header"
    for name, type_name, shape, offset, nbytes in records:
        window.place = f"tensor {name!r}"
        start = data_offset + offset
        if offset % alignment:
            window.fail(f"its offset {offset} is not a multiple of the alignment {alignment}", offset=start)
        if offset < expected:
            window.fail(f"its offset {offset} overlaps {before!r}, which ends at {expected}", offset=start)
        if offset > expected:
            window.fail(
                f"its offset {offset} leaves a gap after {before!r}, which ends at {expected}", offset=start
            )
        if start + nbytes > window.size:
            window.fail(
                f"truncated: its data ends at byte {start + nbytes}, but the file ends at byte {window.size}",
                "Download or copy the file again.",
                offset=start,
            )
        tensors.append(TensorRecord(name, type_name, shape, start, nbytes))
        expected, before = _pad(offset + nbytes, alignment), name
    return tuple(tensors)


def _pad(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
