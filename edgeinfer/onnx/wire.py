"""The protobuf wire format, read field by field without copying: what an ONNX file is made of.

A model's weights may be gigabytes inside one message, so the file is never parsed as a whole. Numbers of
fields are those of onnx.proto (ONNX 1.x, IR version 3 to 13); anything unknown is passed over, as protobuf
asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are not a protobuf message; the text says where."""


class Field(NamedTuple):
    """One field of a message: its value is `number_value` (VARINT), or lies in [start, end) of the buffer."""

    number: int
    kind: int
    number_value: int
    start: int
    end: int
    begins: int  # where its tag is


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in data[start:end], in order. WireError for what cannot be one."""
    at = start
    while at < end:
        begins = at
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"a field without a number at byte {begins}")
        value, first = 0, at
        if kind == VARINT:
            value, at = _varint(data, at, end)
        elif kind == BYTES:
            length, first = _varint(data, at, end)
            at = first + length
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        else:
            raise WireError(f"a field of unknown kind {kind} at byte {begins}")
        if at > end:
            raise WireError(
                f"a field at byte {begins} that ends at byte {at}, beyond its message's end at {end}"
            )
        yield Field(number, kind, value, first, at, begins)


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends) of the variable-length number at `at`."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise WireError(f"a number of more than ten bytes before byte {at}")
    raise WireError(f"a number that goes on at byte {at}, beyond its message's end")


def signed(value: int) -> int:
    """An int32 or int64 as protobuf writes it: negative ones in two's complement of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def packed(data: memoryview, field: Field) -> list[int]:
    """Repeated varints, whether packed into one field or not."""
    if field.kind == VARINT:
        return [field.number_value]
    values, at = [], field.start
    while at < field.end:
        value, at = _varint(data, at, field.end)
        values.append(value)
    return values


def encode(number: int, payload: bytes) -> bytes:
    """A field of bytes: a text or a message."""
    return encode_varint(number << 3 | BYTES) + encode_varint(len(payload)) + payload


def encode_number(number: int, value: int) -> bytes:
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
