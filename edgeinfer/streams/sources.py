"""Where a stream comes from: a WAV file, raw samples or frames on standard input, a folder of pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.inputs.files import Pipe, kind_of, open_input, standard_input
from edgeinfer.inputs.sound import (
    BYTES_OF,
    SoundFormat,
    WavHeader,
    check_rate,
    decode_samples,
    read_header,
    read_pieces,
    resampler,
)
from edgeinfer.onnx.ports import Port

PIECE_SECONDS = 0.032  # of a live stream; what is not live is read in larger pieces, which cost less
FAST_PIECE_SECONDS = 0.256
_ENDLESS = 0x7FFFF000  # what programs that write a WAV file into a pipe say of its length
_PIPED = "standard input"
_PICTURES = (".png", ".jpg", ".jpeg")


def wav_source(
    path: str, rate: int, piece: int, resample: bool, open_file: Callable[[str], BinaryIO] = open_input
) -> Iterator[np.ndarray]:
    """The samples of a WAV file, `piece` at a time. The header is checked now, the samples as they are
    read."""
    file = open_file(path)
    try:
        if kind_of(file) != "sound":
            raise InputError(
                f"{path} is not a WAV file. Expected one, a folder of pictures, or - for standard input."
            )
        header = read_header(file, path)
        change = check_rate(header.format.rate, rate, path, resample)
    except BaseException:
        file.close()
        raise
    samples = max(1, piece * header.format.rate // rate)
    unknown = header.nbytes >= _ENDLESS and header.nbytes > file.seek(0, 2) - header.offset
    file.seek(header.offset)
    if unknown:
        pieces = _raw_pieces(file, header.format, samples, path)
    else:
        pieces = read_pieces(file, header, samples)
    if change:
        pieces = resampled(pieces, header.format.rate, rate)
    return _closing(pieces, file)


def resampled(pieces: Iterable[np.ndarray], found: int, wanted: int) -> Iterator[np.ndarray]:
    change = resampler(found, wanted)
    for samples in pieces:
        made = change.resample_chunk(samples)
        if len(made):
            yield made
    yield change.resample_chunk(np.zeros(0, np.float32), last=True)


def _closing(pieces: Iterable[np.ndarray], file: BinaryIO) -> Iterator[np.ndarray]:
    with file:
        yield from pieces


class PipedSound:
    """Sound from standard input as it comes: a WAV file, or samples that `raw` describes (see `parse_raw`;
    None: 16 bits at the model's rate)."""

    def __init__(self, raw: str | None):
        self._pipe: Pipe = standard_input()
        self._raw = raw

    @cached_property
    def _header(self) -> WavHeader | None:
        """Waits for the first bytes, unless `raw` was given."""
        if self._raw is None and self._pipe.peek(4) in (b"RIFF", b"RF64"):
            return read_header(self._pipe, _PIPED)
        return None

    @property
    def rate(self) -> int | None:
        """Samples a second, where it is stated. Raises InputError."""
        if self._header is not None:
            return self._header.format.rate
        is_stated = (self._raw or "").split(":")[1:2] not in ([], [""])
        return parse_raw(self._raw, 1).rate if is_stated else None

    def pieces(self, rate: int, piece: int, resample: bool) -> Iterator[np.ndarray]:
        """`piece` samples at `rate` at a time. Raises InputError, also where it ends in the middle of a
        sample."""
        header = self._header
        form = header.format if header else parse_raw(self._raw or "s16", rate)
        change = check_rate(form.rate, rate, "Standard input", resample)
        samples = max(1, piece * form.rate // rate)
        if header and 0 < header.nbytes < _ENDLESS:
            pieces = read_pieces(self._pipe, header, samples)
        else:
            pieces = _raw_pieces(self._pipe, form, samples, _PIPED)
        return resampled(pieces, form.rate, rate) if change else pieces


def _raw_pieces(file: BinaryIO, form: SoundFormat, samples: int, name: str) -> Iterator[np.ndarray]:
    for data in _blocks(file, samples * form.frame_bytes, form.frame_bytes, name, "sample"):
        yield decode_samples(data, form.encoding, form.channels)


def offered_rate(source: str, open_file: Callable[[str], BinaryIO] = open_input) -> int | None:
    """Samples a second of a WAV file; None for anything else."""
    if source != "-" and not Path(source).is_file():
        return None
    with open_file(source) as file:
        return read_header(file, source).format.rate if kind_of(file) == "sound" else None


def frame_source(port: Port, name: str = _PIPED) -> Iterator[np.ndarray]:
    """Frames of the input's type and shape, one behind the other, from standard input."""
    shape = tuple(
        1 if not isinstance(size, int) and axis == 0 else size for axis, size in enumerate(port.shape)
    )
    if port.dtype == object or not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"Frames cannot be read from {name}: input {port.name!r} is {port.describe()}, whose size is "
            "not fixed."
        )
    size = port.dtype.itemsize * int(np.prod(shape))
    for data in _blocks(standard_input(), size, size, name, "frame"):
        yield np.frombuffer(data, port.dtype.newbyteorder("<")).astype(port.dtype).reshape(shape)


def _blocks(file: BinaryIO, size: int, unit: int, name: str, what: str) -> Iterator[bytes]:
    """Blocks of `size` bytes; the last one may be shorter, in whole units."""
    while data := file.read(size):
        if len(data) % unit:
            raise InputError(
                f"{name[:1].upper()}{name[1:]} ended in the middle of a {what}: {len(data) % unit:,} of "
                f"{unit:,} bytes. "
                "Check that --raw says what is sent."
            )
        yield data


def picture_source(folder: str) -> Iterator[Any]:
    """The PNG and JPEG pictures of a folder, by name."""
    from edgeinfer.inputs.images import read_picture

    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _PICTURES)
    if not paths:
        raise InputError(f"There is no picture (.png, .jpg) in the folder {folder}.")

    def pictures() -> Iterator[Any]:
        for path in paths:
            with open_input(str(path)) as file:
                picture = read_picture(file, str(path))
            picture.info["name"] = path.name
            yield picture

    return pictures()


def paced(pieces: Iterable[Any], seconds_of: Any) -> Iterator[Any]:
    """`pieces` in real time: each one when it would be whole. `seconds_of`: the length of a piece in
    seconds."""
    due = time.perf_counter()
    for piece in pieces:
        due += seconds_of(piece)
        time.sleep(max(0.0, due - time.perf_counter()))
        yield piece


def parse_raw(text: str, rate: int) -> SoundFormat:
    """ "s16", "f32:16000", "s16:16000:2": encoding, samples a second (None: the model's), channels."""
    encoding, _, rest = text.partition(":")
    stated, _, channels = rest.partition(":")
    try:
        form = SoundFormat(encoding.removesuffix("le"), int(stated or rate), int(channels or 1))
        if form.encoding not in BYTES_OF or form.rate < 1 or not 1 <= form.channels <= 64:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--raw {text} cannot be read. Expected {', '.join(BYTES_OF)}, and if need be :RATE and "
            ":CHANNELS: s16:16000:2."
        ) from None
    return form
