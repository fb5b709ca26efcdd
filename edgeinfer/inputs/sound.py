"""WAV files: PCM of 8, 16, 24 and 32 bits and floating point, as float32 samples from -1 to 1.

The standard library's `wave` knows no floating point and, before Python 3.12, no extensible header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from edgeinfer.errors import InputError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_BY_TAG = {
    (_PCM, 8): "u8",
    (_PCM, 16): "s16",
    (_PCM, 24): "s24",
    (_PCM, 32): "s32",
    (_FLOAT, 32): "f32",
    (_FLOAT, 64): "f64",
}
BYTES_OF = {"u8": 1, "s16": 2, "s24": 3, "s32": 4, "f32": 4, "f64": 8}


@dataclass(frozen=True)
class SoundFormat:
    """`encoding`: "u8", "s16", "s24", "s32", "f32", "f64" (little-endian); `rate` in samples a second."""

    encoding: str
    rate: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of every channel."""
        return BYTES_OF[self.encoding] * self.channels


@dataclass(frozen=True)
class WavHeader:
    format: SoundFormat
    offset: int  # of the samples, in bytes
    nbytes: int  # of the samples, as the header says
    name: str


def decode_samples(data: bytes, encoding: str, channels: int) -> np.ndarray:
    """float32 [samples]: the mean of the channels. `data` is whole frames."""
    if encoding == "u8":
        values = (np.frombuffer(data, "u1").astype(np.float32) - 128) / 128
    elif encoding == "s24":
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    elif encoding[0] == "s":
        integers = np.frombuffer(data, f"<i{BYTES_OF[encoding]}")
        values = (integers / 2.0 ** (8 * BYTES_OF[encoding] - 1)).astype(np.float32)
    else:
        values = np.frombuffer(data, f"<f{BYTES_OF[encoding]}").astype(np.float32)
    if channels > 1:
        values = values.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return values


def read_header(file: BinaryIO, name: str) -> WavHeader:
    """The format and the place of the samples; `file` is then at the first one. Raises InputError."""
    start = _exactly(file, 12, name)
    if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
        raise InputError(
            f"{name} is not a WAV file: expected RIFF...WAVE, found {start[:4]!r}...{start[8:]!r}."
        )
    form: SoundFormat | None = None
    long_size: int | None = None  # of the samples, where 32 bits do not hold it (EBU Tech 3306)
    offset = 12
    while True:
        kind, size = struct.unpack("<4sI", _exactly(file, 8, name))
        offset += 8
        if kind == b"data":
            if form is None:
                raise InputError(
                    f"{name} is not a WAV file that can be read: its samples come before their format."
                )
            is_long = long_size is not None and size == 0xFFFFFFFF
            return WavHeader(form, offset, long_size if is_long else size, name)
        if size > 1 << 24 and kind in (b"fmt ", b"ds64"):
            raise InputError(f"{name} is not a WAV file that can be read: its format takes {size:,} bytes.")
        if kind == b"fmt ":
            form = _format(_exactly(file, size + size % 2, name), name)
        elif kind == b"ds64" and size >= 16:
            long_size = struct.unpack_from("<Q", _exactly(file, size + size % 2, name), 8)[0]
        else:
            _skip(file, size + size % 2, name)
        offset += size + size % 2


def _exactly(file: BinaryIO, size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise InputError(f"The WAV file {name} ends in its header: it is cut short. Copy or record it again.")
    return data


def _skip(file: BinaryIO, size: int, name: str) -> None:
    while size > 0:
        size -= len(_exactly(file, min(size, 1 << 20), name))


def _format(data: bytes, name: str) -> SoundFormat:
    if len(data) < 16:
        raise InputError(
            f"{name} is not a WAV file that can be read: its format has {len(data)} bytes, expected 16."
        )
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data)
    if tag == _EXTENSIBLE and len(data) >= 26:
        tag = struct.unpack_from("<H", data, 24)[0]
    encoding = _BY_TAG.get((tag, bits))
    if encoding is None:
        raise InputError(
            f"The WAV file {name} has samples of format {tag} with {bits} bits. Expected PCM of 8, 16, 24 "
            "or 32 bits, "
            "or floating point of 32 or 64. Convert it first."
        )
    if not channels or not rate:
        raise InputError(f"The WAV file {name} says {channels} channels and {rate} samples a second.")
    return SoundFormat(encoding, rate, channels)


def read_pieces(file: BinaryIO, header: WavHeader, samples: int) -> Iterator[np.ndarray]:
    """The samples, float32, `samples` at a time (the last piece may be shorter). InputError where the file is
    cut."""
    left = header.nbytes
    frame = header.format.frame_bytes
    if left % frame:
        raise InputError(
            f"The WAV file {header.name} ends in the middle of a sample: {left:,} bytes are not whole "
            f"samples of {frame}."
        )
    while left:
        wanted = min(left, samples * frame)
        data = file.read(wanted)
        if len(data) < wanted:
            found = header.nbytes - left + len(data)
            raise InputError(
                f"The WAV file {header.name} is cut short: its header says {header.nbytes:,} bytes of "
                "samples, the "
                f"file has {found:,}. Copy or record it again."
            )
        left -= wanted
        yield decode_samples(data, header.format.encoding, header.format.channels)


def read_wav(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """(all samples as float32, channels mixed; samples a second)"""
    header = read_header(file, name)
    pieces = list(read_pieces(file, header, 1 << 20))
    return (np.concatenate(pieces) if pieces else np.zeros(0, np.float32)), header.format.rate


def check_rate(found: int, wanted: int, name: str, resample: bool) -> bool:
    """Whether the sound has to be resampled. InputError where it has to and was not asked for."""
    if found != wanted and not resample:
        raise InputError(
            f"{name} has {found:,} samples a second, the model takes {wanted:,}. Give --resample, or "
            "convert it first."
        )
    return found != wanted


def resampler(found: int, wanted: int) -> object:
    """A soxr stream: `resample_chunk(samples, last)`."""
    try:
        import soxr
    except ModuleNotFoundError:
        raise InputError(
            'Changing the sample rate needs the package soxr: pip install "edgeinfer[inputs]".'
        ) from None
    return soxr.ResampleStream(found, wanted, 1, dtype="float32")
