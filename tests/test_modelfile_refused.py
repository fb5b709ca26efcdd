"""Files that are wrong in one way each, and paths that are no readable files: what the refusal says."""

import os
import struct

import pytest
from gguf_bytes import (
    ARCHITECTURE,
    ARRAY,
    I32,
    Q4_0,
    STRING,
    U32,
    array,
    f32,
    gguf,
    key,
    stock_accepts,
    string,
    tensor,
    u32,
)
from modelfile_cases import DATA, ONE_TENSOR, TOKENS, refused

from edgeinfer.errors import ModelFileError
from edgeinfer.gguf_window import Window
from edgeinfer.modelfile import read_model_file

BIG = (1 << 63) - 1
MALFORMED = {
    "empty": (b"", r"model.gguf: is empty. Expected a GGUF model: download"),
    "one byte": (b"G", r"is not a GGUF model: it starts with b'G' instead of b'GGUF'"),
    "other magic": (b"ONNX" + bytes(60), r"is not a GGUF model: it starts with b'ONNX'.*convert the model"),
    "zeros": (bytes(64), r"starts with zeros, as an unfinished download does"),
    "web page": (b"<!DOCTYPE html><html>", r"looks like a web page.*download the model again"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer.*`git lfs pull`"),
    "zip": (b"PK\x03\x04" + bytes(60), r"zip archive or a PyTorch checkpoint: convert it"),
    "old llama.cpp": (b"tjgg" + bytes(60), r"format that llama.cpp used before GGUF"),
    "safetensors": (struct.pack("<Q", 9) + b'{"a": {}}', r"looks like a safetensors file: convert it"),
    "magic only": (
        b"GGUF",
        r"truncated: the version needs 4 bytes, but 0 of 4 are left \(byte 4, the header\)",
    ),
    "version 1": (gguf(version=1), r"is GGUF version 1, which llama.cpp no longer reads.*newer version"),
    "version 4": (gguf(version=4), r"has GGUF version 4, expected 2 or 3 .*newer edgeinfer"),
    "version 0": (gguf(version=0), r"has GGUF version 0, expected 2 or 3"),
    "big endian": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        r"is a big-endian GGUF file .*little-endian files only",
    ),
    "counts cut": (gguf()[:20], r"truncated: the number of keys needs 8 bytes, but 4 of 20 are left"),
    "too many keys": (
        gguf(num_keys=1 << 40),
        r"claims 1099511627776 keys, but the \d+ bytes left hold \d+ at most",
    ),
    "negative keys": (gguf(num_keys=(1 << 64) - 1), r"claims 18446744073709551615 keys"),
    "keys over the limit": (
        gguf(num_keys=70000, data=bytes(1 << 20)),
        r"claims 70000 keys, more than the 65536",
    ),
    "too many tensors": (
        gguf(num_tensors=999),
        r"claims 999 tensors, but the \d+ bytes left hold \d+ at most",
    ),
    "tensors over the limit": (
        gguf(num_tensors=200000, data=bytes(5 << 20)),
        r"claims 200000 tensors, more than",
    ),
    "one key missing": (gguf(num_keys=2, data=bytes(6)), r"key 2 of 2"),
    "key empty": (gguf([u32(b"", 1)]), r"the key is empty or has a zero byte in it.*byte 24, key 1 of 1"),
    "key with zero byte": (gguf([u32(b"a\0b", 1)]), r"the key is empty or has a zero byte in it: b'a\\x00b'"),
    "key not UTF-8": (gguf([u32(b"\xff\xfe", 1)]), r"the key is not valid UTF-8: b'\\xff\\xfe'"),
    "key too long": (gguf([u32(b"k" * 70000, 1)]), r"the key has 70000 bytes, more than the 65535 allowed"),
    "key past the end": (
        gguf([string(b"key", 1 << 60)]),
        r"truncated: the key has 1152921504606846976 bytes, but",
    ),
    "duplicate key": (gguf([u32(b"a", 1), u32(b"a", 2)]), r"duplicate key 'a' \(byte 41, key 2 of 2\)"),
    "value type": (gguf([key(b"a", 13, bytes(8))]), r"value type 13 is unknown, expected 0 to 12 .*key 'a'"),
    "value cut": (
        gguf([key(b"abc", 12, b"")], alignment=1),
        r"the value needs 8 bytes, but 0 of 39 are left",
    ),
    "string past the end": (
        gguf([key(b"a", STRING, string(b"xyz", 4000))]),
        r"truncated: the value has 4000 bytes, but \d+ are left .*key 'a'",
    ),
    "string too long": (
        gguf([key(b"a", STRING, string(bytes((16 << 20) + 1)))]),
        r"the value has 16777217 bytes, more than the 16777216 allowed",
    ),
    "array of arrays": (
        gguf([array(b"a", ARRAY, 1, bytes(20))]),
        r"element type 9 .*array of arrays, which llama.cpp",
    ),
    "array of unknown": (gguf([array(b"a", 77, 1, bytes(20))]), r"element type 77 of an array is unknown"),
    "array too long": (
        gguf([array(b"a", U32, 1 << 62, bytes(8))]),
        r"array claims 4611686018427387904 elements, but the \d+ bytes left hold \d+ at most",
    ),
    "strings too many": (gguf([array(b"a", STRING, 1000, string(b"x"))]), r"array claims 1000 elements, but"),
    "long string in a short array": (
        gguf([array(b"a", STRING, 2, string(b"x") + string(b"y", 999))]),
        r"truncated: a string has 999 bytes",
    ),
    "long string in a long array": (
        gguf([array(b"a", STRING, 300, string(b"x") * 299 + string(b"y", 1 << 63))]),
        r"truncated: string 300 of 300 has 9223372036854775808 bytes, but 4 are left \(byte 2740, key 'a'\)",
    ),
    "duplicate token": (
        gguf([ARCHITECTURE, array(TOKENS, STRING, 3, string(b"a") + string(b"") + string(b"a"))]),
        r"element 2 is a duplicate: 'a' .*tokenizer.ggml.tokens",
    ),
    "too many tokens": (
        gguf([array(TOKENS, STRING, 1 << 21, bytes(8 << 21))]),
        r"vocabulary of 2097152 tokens, more than the 1048576",
    ),
    "alignment 24": (
        gguf([ARCHITECTURE, u32(b"general.alignment", 24)]),
        r"power of two, found u32 24 .*general.al",
    ),
    "alignment 0": (gguf([ARCHITECTURE, u32(b"general.alignment", 0)]), r"power of two, found u32 0"),
    "alignment signed": (
        gguf([ARCHITECTURE, key(b"general.alignment", I32, struct.pack("<i", 32))]),
        r"must be a u32 that is a power of two, found i32 32",
    ),
    "no architecture": (
        gguf([u32(b"a", 1)]),
        r"'general.architecture' must name the architecture, found no such key",
    ),
    "architecture number": (
        gguf([u32(b"general.architecture", 1)]),
        r"must name the architecture, found u32",
    ),
    "0 layers": (
        gguf([ARCHITECTURE, u32(b"llama.block_count", 0)], [ONE_TENSOR], DATA),
        r"key 'llama.block_count' is 0, expected 1 to 512",
    ),
    "epsilon not a number": (
        gguf(
            [ARCHITECTURE, f32(b"llama.attention.layer_norm_rms_epsilon", float("nan"))], [ONE_TENSOR], DATA
        ),
        r"key 'llama.attention.layer_norm_rms_epsilon' is nan, expected 0 or more",
    ),
    "negative epsilon": (
        gguf([ARCHITECTURE, f32(b"llama.attention.layer_norm_epsilon", -1.0)], [ONE_TENSOR], DATA),
        r"key 'llama.attention.layer_norm_epsilon' is -1.0, expected 0 or more",
    ),
    "layers as text": (
        gguf([ARCHITECTURE, key(b"llama.block_count", STRING, string(b"x"))], [ONE_TENSOR], DATA),
        r"key 'llama.block_count' must be a count, found 'x'",
    ),
    "layer 512": (
        gguf(tensors=[tensor(b"blk.512.x", (8,))], data=DATA),
        r"'blk.512.x' is of layer 512, expected 0 to",
    ),
    "tensor name long": (
        gguf(tensors=[tensor(b"n" * 64, (8,))], data=DATA),
        r"the tensor's name has 64 bytes, more than the 63 allowed \(byte \d+, tensor 1 of 1\)",
    ),
    "tensor name empty": (gguf(tensors=[tensor(b"", (8,))], data=DATA), r"the tensor's name is empty"),
    "tensor name cut": (
        gguf(tensors=[string(b"output", 30)], data=b""),
        r"truncated: the tensor's name has 30 bytes, but 19 are left \(byte 69, tensor 1 of 1\)",
    ),
    "duplicate tensor": (
        gguf(tensors=[ONE_TENSOR, tensor(b"output.weight", (8,), 32)], data=DATA * 2),
        r"duplicate tensor name 'output.weight' .*tensor 2 of 2",
    ),
    "5 dimensions": (
        gguf(tensors=[tensor(b"x", (1, 1, 1, 1, 1))], data=DATA),
        r"5 dimensions, expected 4 at most",
    ),
    "dimension 0": (gguf(tensors=[tensor(b"x", (8, 0))], data=DATA), r"dimension 1 is 0, expected 1 to"),
    "dimension negative": (
        gguf(tensors=[tensor(b"x", (1 << 63,))], data=DATA),
        r"dimension 0 is 9223372036854775808",
    ),
    "dimensions overflow": (
        gguf(tensors=[tensor(b"x", (1 << 32, 1 << 32))], data=DATA),
        r"dimensions \(4294967296, 4294967296\) overflow: more than 9223372036854775807 elements",
    ),
    "unknown type": (
        gguf(tensors=[tensor(b"x", (8,), 0, 43)], data=DATA),
        r"type 43 is unknown, expected 0 to 42",
    ),
    "removed type": (
        gguf(tensors=[tensor(b"x", (8,), 0, 31)], data=DATA),
        r"type Q4_0_4_4 was removed .*such as Q4_0",
    ),
    "row and block": (
        gguf(tensors=[tensor(b"x", (48, 2), 0, Q4_0)], data=DATA * 2),
        r"rows of 48 elements are not a multiple of 32, the block size of Q4_0",
    ),
    "misaligned": (
        gguf(tensors=[tensor(b"x", (4,)), tensor(b"y", (4,), 16)], data=DATA * 2),
        r"its offset 16 is not a multiple of the alignment 32 \(byte \d+, tensor 'y'\)",
    ),
    "overlap": (
        gguf(tensors=[tensor(b"x", (16,)), tensor(b"y", (4,), 32)], data=DATA * 4),
        r"its offset 32 overlaps 'x', which ends at 64 .*tensor 'y'",
    ),
    "gap": (
        gguf(tensors=[tensor(b"x", (8,)), tensor(b"y", (4,), 64)], data=DATA * 4),
        r"its offset 64 leaves a gap after 'x', which ends at 32",
    ),
    "offset huge": (
        gguf(tensors=[tensor(b"x", (8,), BIG - 31)], data=DATA),
        r"leaves a gap after 'the header', which ends at 0",
    ),
    "past the end": (
        gguf(tensors=[tensor(b"x", (9,))], data=DATA),
        r"truncated: its data ends at byte \d+, but the file ends at byte \d+ .*tensor 'x'\). Download or",
    ),
    "huge tensor": (
        gguf(tensors=[tensor(b"x", (BIG,))], data=DATA),
        r"truncated: its data ends at byte 36893488147419",
    ),
    "no data": (gguf(tensors=[tensor(b"x", (8,))])[:-8], r"truncated: its data ends at byte"),
}
#: Refused here although llama.cpp's GGUF reader takes the header: it fails later, or limits of our own.
STRICTER = {
    "key with zero byte",
    "key not UTF-8",
    "key too long",
    "string too long",
    "duplicate token",
    "too many tokens",
    "no architecture",
    "architecture number",
    "0 layers",
    "layers as text",
    "layer 512",
    "tensor name empty",
    "dimension 0",
    "epsilon not a number",
    "negative epsilon",
    "past the end",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused(name, write):
    content, words = MALFORMED[name]
    path = write(content)
    refused(path, words)
    assert stock_accepts(path) == (name in STRICTER)


def test_header_that_is_too_long(write):
    path = write(gguf([ARCHITECTURE, array(b"a", 0, 200 << 20, b"")]))
    os.truncate(path, 300 << 20)  # the array is there, as zeros, in a sparse file
    refused(path, r"the header is longer than 128 MiB, the most that edgeinfer reads .*key 'a'")


def test_every_truncation_is_refused(write):
    content = gguf(
        [ARCHITECTURE, array(b"words", STRING, 2, string(b"a") + string(b"b"))], [ONE_TENSOR], DATA
    )
    assert read_model_file(write(content)).tensor("output.weight").nbytes == 32
    for length in range(len(content)):
        with pytest.raises(ModelFileError):
            read_model_file(write(content[:length]))


# Paths that are not readable files


def test_missing_file(tmp_path):
    refused(tmp_path / "none.gguf", r"none.gguf: there is no such file. Check the path")


def test_directory(tmp_path):
    refused(tmp_path, r"is a directory. Give the path of a .gguf file in it")


def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", r"is a device, pipe or socket. A model must be a regular file")


def test_device():
    with pytest.raises(ModelFileError, match="/dev/null: is a device"):
        read_model_file("/dev/null")


def test_zero_byte_in_path():
    with pytest.raises(ModelFileError, match="zero byte"):
        read_model_file("a\0b")


def test_unreadable_file(write):
    path = write(gguf())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything: look as nobody
        os.seteuid(65534)
    try:
        refused(path, "cannot be read: Permission denied. Check")
    finally:
        os.seteuid(user)


def test_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    refused(tmp_path / "a", r"cannot be read: Too many levels of symbolic links")


def test_file_that_shrinks_while_it_is_read(write):
    path = write(b"GGUF")
    with path.open("rb") as file:
        window = Window(file, path, 100)
        with pytest.raises(ModelFileError, match="became shorter while it was read"):
            window.need(50, "the header")
