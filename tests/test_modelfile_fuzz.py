"""Thousands of damaged headers: each is read as a sound model or refused with ModelFileError."""

import os
import random
import struct
import time
from pathlib import Path

import pytest
from gguf_bytes import (
    ARCHITECTURE,
    I32,
    Q4_0,
    STRING,
    array,
    data_folder,
    gguf,
    key,
    stock_accepts,
    string,
    tensor,
    u32,
)

from edgeinfer.budget import process_memory, reset_peak
from edgeinfer.errors import ModelFileError
from edgeinfer.gguf_window import Window
from edgeinfer.modelfile import read_model_file

EXTREMES = sorted(
    {0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257, 4096}
    | {(1 << bits) + delta for bits in (15, 16, 20, 24, 31, 32, 40, 62, 63, 64) for delta in (-1, 0, 1)}
)
MAX_SECONDS, MAX_BYTES = 1.0, 50 << 20  # of one reading; seconds of processor time


def small_model() -> tuple[bytes, int]:
    """(header, size of the file): every kind of value, tensors of two types in two layers, experts."""
    keys = [
        ARCHITECTURE,
        u32(b"general.alignment", 64),
        u32(b"llama.block_count", 2),
        u32(b"llama.expert_count", 4),
        key(b"llama.attention.causal", 7, b"\1"),
        key(b"a.float", 12, struct.pack("<d", 0.5)),
        array(b"tokenizer.ggml.tokens", STRING, 300, b"".join(string(b"t%d" % n) for n in range(300))),
        array(b"tokenizer.ggml.merges", STRING, 300, b"".join(string(b"a b") for _ in range(300))),
        array(b"tokenizer.ggml.scores", 6, 300, bytes(1200)),
        array(b"few.words", STRING, 2, string(b"one") + string(b"two")),
        array(b"few.numbers", I32, 3, bytes(12)),
        key(b"tokenizer.chat_template", STRING, string(b"{{ messages }}")),
    ]
    tensors, offset = [], 0
    for name, shape, type_number, nbytes in [
        (b"token_embd.weight", (64, 300), Q4_0, 64 * 300 // 32 * 18),
        (b"blk.0.ffn_up_exps.weight", (32, 8, 4), Q4_0, 8 * 4 * 18),
        (b"blk.1.attn_norm.weight", (64,), 0, 256),
        (b"blk.1.attn_q.bias", (3,), 0, 12),
    ]:
        tensors.append(tensor(name, shape, offset, type_number))
        offset += -(-nbytes // 64) * 64
    header = gguf(keys, tensors, alignment=64)
    return header, len(header) + offset


def real_model(name: str) -> tuple[bytes, int]:
    """The header of a real file, up to its first tensor, and the size of that file."""
    path = data_folder() / name
    header_bytes = min(t.offset for t in read_model_file(path).tensors)
    with path.open("rb") as file:
        return file.read(header_bytes), path.stat().st_size


def integer_places(path: Path, monkeypatch) -> list[tuple[int, int]]:
    """(offset, width) of every number that the reader takes from a sound file: counts, lengths, types."""
    places = []
    scalar = Window.scalar

    def record(window, form, what):
        places.append((window.offset, form.size))
        return scalar(window, form, what)

    with monkeypatch.context() as patch:
        patch.setattr(Window, "scalar", record)
        read_model_file(path)
    return places


def mutations(header: bytes, places: list[tuple[int, int]], count: int, rng: random.Random):
    """`count` damaged headers, a third each: extreme numbers, flipped bits, pieces cut out or put in."""
    for index in range(count):
        damaged = bytearray(header)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if index % 3 == 0:
                offset, width = rng.choice(places)
                value = rng.choice(EXTREMES) % (1 << 8 * width)
                damaged[offset : offset + width] = value.to_bytes(width, "little")
            elif index % 3 == 1:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            else:
                at, length = rng.randrange(len(damaged)), rng.randrange(1, 40)
                piece = rng.randbytes(length) if rng.random() < 0.5 else b""
                damaged[at : at + rng.choice((0, length))] = piece
        yield bytes(damaged)


def check(path: Path, size: int) -> bool:
    """Whether the file was accepted: then all tensors lie in it, and llama.cpp's reader accepts it too."""
    started = time.process_time()
    try:
        model = read_model_file(path)
    except ModelFileError as error:
        assert str(path) in str(error)
        assert len(str(error)) < len(str(path)) + 1000
        return False
    finally:
        assert time.process_time() - started < MAX_SECONDS
    end = 0
    for found in sorted(model.tensors, key=lambda t: t.offset):
        assert end <= found.offset and found.nbytes > 0
        end = found.offset + found.nbytes
    assert end <= size
    assert stock_accepts(path)
    return True


def fuzz(header: bytes, size: int, count: int, path: Path, monkeypatch) -> tuple[int, int]:
    """(accepted, refused) of `count` mutations."""

    def write(content: bytes, file_size: int) -> None:
        with path.open("r+b") as file:  # not "wb": some file systems flush a file that was emptied
            file.write(content)
            file.truncate(file_size)  # the weights are zeros in a sparse file

    path.touch()
    write(header, size)
    places = integer_places(path, monkeypatch)
    assert check(path, size)
    rng = random.Random(20240607)
    accepted = 0
    can_measure = reset_peak()
    before = process_memory().rss_bytes
    for damaged in mutations(header, places, count, rng):
        file_size = rng.randrange(size) if rng.random() < 0.1 else size + len(damaged) - len(header)
        write(damaged, file_size)
        accepted += check(path, file_size)
    assert not can_measure or process_memory().peak_rss_bytes - before < MAX_BYTES
    return accepted, count - accepted


def test_small_header(tmp_path, monkeypatch):
    accepted, refused = fuzz(*small_model(), 8000, tmp_path / "m.gguf", monkeypatch)
    # Both outcomes are exercised: a flipped bit in a token is a sound file, a wrong length is not.
    assert accepted > 400 and refused > 4000


@pytest.mark.parametrize("name", ["lm/stories260K.gguf", "lm/stories260K-moe4x.gguf"])
def test_header_of_a_real_file(name, tmp_path, monkeypatch):
    header, size = real_model(name)
    accepted, refused = fuzz(header, size, 1500, tmp_path / "m.gguf", monkeypatch)
    assert accepted > 80 and refused > 400


def test_every_number_at_every_extreme(tmp_path, monkeypatch):
    """Not chosen by chance: each number of the small header takes each extreme value, alone."""
    header, size = small_model()
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    os.truncate(path, size)
    refused = 0
    values = (0, 1, 33, 65, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
    for offset, width in integer_places(path, monkeypatch):
        for value in values:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write((value % (1 << 8 * width)).to_bytes(width, "little"))
            refused += not check(path, size)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(header[offset : offset + width])
    assert refused > 300
    assert check(path, size)
