"""WAV files of every encoding, against the standard library and numpy; broken ones."""

import io
import struct
import wave

import numpy as np
import pytest

from edgeinfer.errors import InputError
from edgeinfer.inputs.sound import read_header, read_pieces, read_wav, resampler

VALUES = np.array([0, 0.5, -0.5, 0.25, -1, 0.999], np.float64)


def wav_bytes(tag, bits, data, channels=1, rate=16000, extra=b"", extensible=False, size=None):
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else tag, channels, rate, rate * align, align, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, tag) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + extra
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def encoded(tag, bits):
    if tag == 3:
        return VALUES.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return (np.round(VALUES * 127) + 128).astype(np.uint8).tobytes()
    whole = np.round(VALUES * (2 ** (bits - 1) - 1)).astype("<i4")
    return (
        whole.astype(f"<i{bits // 8}").tobytes()
        if bits != 24
        else whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    )


@pytest.mark.parametrize(("tag", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_encoding(tag, bits, extensible):
    data = wav_bytes(
        tag, bits, encoded(tag, bits), extensible=extensible, extra=b"LIST" + struct.pack("<I", 3) + b"abc\0"
    )
    samples, rate = read_wav(io.BytesIO(data), "x.wav")
    assert rate == 16000 and samples.dtype == np.float32
    np.testing.assert_allclose(samples, VALUES, atol=1 / 100 if bits == 8 else 1e-4)


def test_long_recordings(tmp_path):
    """RF64 says the bytes of its samples in 64 bits, in a chunk of its own (EBU Tech 3306)."""
    long = struct.pack("<4sIQQQI", b"ds64", 28, 0, 2 * len(VALUES), len(VALUES), 0)
    plain = wav_bytes(1, 16, encoded(1, 16), size=0xFFFFFFFF)
    data = b"RF64" + b"\xff" * 4 + b"WAVE" + long + plain[12:] + b"LIST\x04\0\0\0abcd"
    samples, _ = read_wav(io.BytesIO(data), "x.wav")
    np.testing.assert_allclose(samples, VALUES, atol=1e-4)


def test_channels_are_mixed_as_the_standard_library_reads_them():
    stereo = np.random.default_rng(0).integers(-30000, 30000, (50, 2)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((2, 2, 44100, 0, "NONE", ""))
        writer.writeframes(stereo.tobytes())
    file.seek(0)
    samples, rate = read_wav(file, "x.wav")
    assert rate == 44100
    np.testing.assert_allclose(samples, stereo.mean(axis=1) / 32768, atol=1e-6)


def test_pieces_are_the_whole():
    data = wav_bytes(1, 16, encoded(1, 16) * 100)
    file = io.BytesIO(data)
    pieces = list(read_pieces(file, read_header(file, "x.wav"), 7))
    assert {len(piece) for piece in pieces[:-1]} == {7} and sum(map(len, pieces)) == 600
    np.testing.assert_array_equal(np.concatenate(pieces), read_wav(io.BytesIO(data), "x.wav")[0])


GOOD = wav_bytes(1, 16, encoded(1, 16))
BROKEN = {
    "a cut header": (GOOD[:30], "ends in its header"),
    "cut samples": (GOOD[:-3], "its header says 12 bytes of samples, the file has 9"),
    "half a sample": (
        wav_bytes(1, 16, bytes(7)),
        "ends in the middle of a sample: 7 bytes are not whole samples of 2",
    ),
    "another file": (b"RIFF\0\0\0\0AVI " + bytes(40), "expected RIFF...WAVE"),
    "no format": (GOOD[:12] + b"data" + struct.pack("<I", 2) + b"ab", "samples come before their format"),
    "a short format": (
        GOOD[:12] + b"fmt " + struct.pack("<I", 4) + bytes(4),
        "format has 4 bytes, expected 16",
    ),
    "a huge format": (
        GOOD[:12] + b"fmt " + struct.pack("<I", 2**31) + bytes(4),
        "format takes 2,147,483,648 bytes",
    ),
    "a huge chunk": (GOOD[:12] + b"LIST" + struct.pack("<I", 2**31) + bytes(40), "ends in its header"),
    "mu-law": (wav_bytes(7, 8, bytes(8)), "format 7 with 8 bits. Expected PCM of 8, 16, 24 or 32 bits"),
    "no channels": (wav_bytes(1, 16, bytes(8), channels=0), "0 channels"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(what):
    data, words = BROKEN[what]
    with pytest.raises(InputError) as error:
        read_wav(io.BytesIO(data), "x.wav")
    assert words in str(error.value) and "x.wav" in str(error.value)


def test_every_cut_is_noticed():
    for length in range(len(GOOD)):
        with pytest.raises(InputError):
            read_wav(io.BytesIO(GOOD[:length]), "x.wav")


def test_resampling_keeps_a_tone():
    tone = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000).astype(np.float32)
    change = resampler(48000, 16000)
    made = np.concatenate(
        [change.resample_chunk(tone[:10000]), change.resample_chunk(tone[10000:], last=True)]
    )
    assert abs(len(made) - 16000) <= 1
    expected = np.sin(2 * np.pi * 440 * np.arange(len(made)) / 16000)
    np.testing.assert_allclose(made[500:-500], expected[500:-500], atol=1e-3)
