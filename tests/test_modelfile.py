"""The model file reader against the gguf package, stock llama.cpp, and files each wrong in one way."""

import ctypes
import os
import struct
import tracemalloc

import gguf as gguf_package
import numpy as np
import pytest
from gguf_bytes import (
    ARCHITECTURE,
    ARRAY,
    F32,
    I32,
    Q4_0,
    STRING,
    U32,
    array,
    data_folder,
    f32,
    gguf,
    key,
    libggml,
    stock_accepts,
    stock_contents,
    string,
    tensor,
    u32,
)

from edgeinfer.errors import ModelFileError
from edgeinfer.ggml_types import GGML_TYPES, REMOVED_TYPES
from edgeinfer.gguf_header import read_header
from edgeinfer.gguf_window import Window
from edgeinfer.modelfile import GGUFArray, read_model_file

REAL_FILES = [
    "lm/stories260K.gguf",
    "lm/stories260K-moe4x.gguf",
    "vocab/ggml-vocab-deepseek-llm.gguf",
    "vocab/ggml-vocab-falcon.gguf",
    "vocab/ggml-vocab-gpt-2.gguf",
    "vocab/ggml-vocab-llama-spm.gguf",
    "vocab/ggml-vocab-phi-3.gguf",
]
ONE_TENSOR = tensor(b"output.weight", (8,))
DATA = bytes(32)


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name: str = "model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def assert_equals_reference(path):
    """Every key and every tensor is what the gguf package reads."""
    model, reference = read_model_file(path), gguf_package.GGUFReader(path)
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert model.version == reference.fields["GGUF.version"].contents()
    assert list(model.metadata) == list(fields)
    for name, field in fields.items():
        found = model.metadata[name]
        if field.types[0] != gguf_package.GGUFValueType.ARRAY:
            assert found == field.contents(), name
        elif len(field.data) <= 256:
            assert found.values == tuple(field.contents())
        else:
            assert (found.length, found.values) == (len(field.data), None)
    assert [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in model.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type.name, t.data_offset, t.n_bytes) for t in reference.tensors
    ]
    return model


@pytest.mark.parametrize(
    "name", ["lm/stories260K.gguf", "lm/stories260K-moe4x.gguf", "vocab/ggml-vocab-phi-3.gguf"]
)
def test_real_file_equals_gguf_package(name):
    path = data_folder() / name
    model = assert_equals_reference(path)
    assert model.file_bytes == path.stat().st_size
    assert model.is_vocabulary_only == name.startswith("vocab/")


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_file_equals_stock_llama_cpp(name):
    path = data_folder() / name
    header = read_header(path)
    found = []
    for name, value in header.metadata.items():
        is_array = isinstance(value, GGUFArray)
        found.append(
            (
                name,
                value.element_type if is_array else header.value_types[name],
                value.length if is_array else None,
            )
        )
    assert (found, [(t.name, t.offset, t.nbytes) for t in header.tensors]) == stock_contents(path)


@pytest.mark.parametrize("name", REAL_FILES[:2])
def test_facts_equal_stock_llama_cpp(name):
    import llama_cpp

    path = data_folder() / name
    stock = llama_cpp.Llama(str(path), n_ctx=32, verbose=False)
    model = read_model_file(path)
    assert model.num_parameters == llama_cpp.llama_model_n_params(stock.model)
    assert model.weights_bytes == llama_cpp.llama_model_size(stock.model)
    assert model.num_layers == llama_cpp.llama_model_n_layer(stock.model)
    assert model.context_length == stock._model.n_ctx_train()
    assert model.embedding_length == stock.n_embd()
    assert model.vocab_size == stock.n_vocab()
    stock.close()


def test_experts_layers_and_roles():
    model = read_model_file(data_folder() / "lm/stories260K-moe4x.gguf")
    assert (model.architecture, model.num_experts, model.num_experts_used) == ("llama", 4, 2)
    up = model.tensor("blk.3.ffn_up_exps.weight")
    assert (up.layer, up.role, up.num_experts, up.shape) == (3, "ffn_up_exps", 4, (64, 172, 4))
    gate = model.tensor("blk.0.ffn_gate_inp.weight")
    assert (gate.role, gate.num_experts) == ("ffn_gate_inp", 0)
    embedding = model.tensor("token_embd.weight")
    assert (embedding.layer, embedding.role) == (None, "token_embd")
    assert sum(t.nbytes for t in model.tensors if t.num_experts) == 5 * 3 * 64 * 172 * 4 * 4
    assert model.is_causal
    model.check_can_generate()


def test_type_table_equals_ggml():
    lib = libggml()
    lib.ggml_blck_size.restype, lib.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    lib.ggml_type_name.restype = ctypes.c_char_p
    for number in range(max(GGML_TYPES) + 1):
        if number in REMOVED_TYPES:
            assert lib.ggml_blck_size(number) == 0
            continue
        found = GGML_TYPES[number]
        assert found.name.upper() == lib.ggml_type_name(number).decode().upper()
        assert (found.block_size, found.block_bytes) == (
            lib.ggml_blck_size(number),
            lib.ggml_type_size(number),
        )


def write_with_package(path, **options):
    """A file of seven tensors in two layers, written by the gguf package."""
    writer = gguf_package.GGUFWriter(path, "llama", **options)
    writer.add_block_count(2)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_array("test.words", ["one", "two"])
    for index, name in enumerate(["token_embd.weight", "output.weight", "output_norm.weight"]):
        writer.add_tensor(name, np.full((4, 32), index, dtype=np.float16))
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", np.ones((3, 64), dtype=np.float32))
        writer.add_tensor(f"blk.{layer}.attn_q.bias", np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_version_2_equals_gguf_package(tmp_path):
    path = tmp_path / "v2.gguf"
    write_with_package(path)
    path.write_bytes(path.read_bytes().replace(b"GGUF\3", b"GGUF\2", 1))
    model = assert_equals_reference(path)
    assert model.version == 2
    assert model.chat_template == "{{ messages }}"
    assert model.metadata["test.words"] == GGUFArray("str", 2, ("one", "two"))
    assert model.tensor("blk.1.attn_q.bias").role == "attn_q.bias"


# Split models


@pytest.fixture
def parts(tmp_path):
    write_with_package(tmp_path / "m.gguf", split_max_tensors=3)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return paths


def test_split_model_equals_gguf_package(parts):
    model = read_model_file(parts[0])
    assert model.paths == tuple(parts)
    expected = [
        (t.name, part, t.data_offset, t.n_bytes)
        for part, path in enumerate(parts)
        for t in gguf_package.GGUFReader(path).tensors
    ]
    assert [(t.name, t.part, t.offset, t.nbytes) for t in model.tensors] == expected
    assert len(expected) == 7
    assert model.file_bytes == sum(path.stat().st_size for path in parts)


def test_split_with_missing_parts_names_them(parts):
    parts[1].unlink()
    parts[2].unlink()
    refused(
        parts[0],
        r"2 of the model's 3 parts are missing: m-00002-of-00003.gguf, m-00003-of-00003.gguf\. Put all",
    )


def test_split_given_by_second_part_names_the_first(parts):
    refused(parts[1], r"is part 2 of 3 of a model. Give its first part: m-00001-of-00003.gguf")


def test_split_with_renamed_first_part(parts):
    refused(
        parts[0].rename(parts[0].with_name("model.gguf")),
        r"must end in '-00001-of-00003.gguf'.*original names",
    )


def test_split_with_parts_mixed_up(parts):
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)
    refused(
        parts[0],
        r"m-00002-of.*says that it is split.no 2 of split.count 3, expected 1 of 3. The parts are mixed",
    )


def test_split_with_truncated_second_part(parts):
    os.truncate(parts[1], parts[1].stat().st_size - 64)
    refused(
        parts[0],
        r"m-00002-of-00003.gguf: truncated: its data ends at byte \d+, but the file ends at byte \d+",
    )


def split_key(name, value, form="H", value_type=2):
    return key(name, value_type, struct.pack("<" + form, value))


def split_files(write, *, total=2, second_name=b"b", second_no=None):
    """Two parts of one tensor each, wrong where the arguments say so."""
    count = split_key(b"split.count", 2)
    first_keys = [
        ARCHITECTURE,
        split_key(b"split.no", 0),
        count,
        key(b"split.tensors.count", I32, struct.pack("<i", total)),
    ]
    second_keys = [second_no or split_key(b"split.no", 1), count]
    write(gguf(second_keys, [tensor(second_name, (8,))], DATA), "s-00002-of-00002.gguf")
    return write(gguf(first_keys, [tensor(b"a", (8,))], DATA), "s-00001-of-00002.gguf")


def test_split_by_hand_is_accepted(write):
    assert [t.name for t in read_model_file(split_files(write)).tensors] == ["a", "b"]


def test_split_with_wrong_tensor_count(write):
    refused(split_files(write, total=3), r"'split.tensors.count' is 3, but the 2 parts have 2 tensors")


def test_split_with_the_same_tensor_twice(write):
    refused(
        split_files(write, second_name=b"a"),
        r"tensor 'a' is also in s-00001-of-00002.gguf. The parts are mixed",
    )


def test_split_key_of_another_type(write):
    path = split_files(write, second_no=u32(b"split.no", 1))
    refused(path, r"s-00002.*key 'split.no' of a split model must be a u16, found u32")


def test_split_count_that_is_huge_is_refused_quickly(write):
    keys = [ARCHITECTURE, split_key(b"split.no", 0), split_key(b"split.count", 65535)]
    path = write(gguf(keys, [tensor(b"a", (8,))], DATA), "s-00001-of-65535.gguf")
    refused(path, r"65534 of the model's 65535 parts are missing: .*, \.\.\.")


# Files that are wrong in one way each


def refused(path, words):
    with pytest.raises(ModelFileError, match=words) as error:
        read_model_file(path)
    assert str(path.parent) in str(error.value)


BIG = (1 << 63) - 1
TOKENS = b"tokenizer.ggml.tokens"
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
        gguf([ARCHITECTURE, f32(b"llama.attention.layer_norm_rms_epsilon", float("nan"))], [ONE_TENSOR], DATA),
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


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_alignments_that_llama_cpp_accepts(alignment, write):
    keys = [ARCHITECTURE, u32(b"general.alignment", alignment)]
    size = 4 * 9
    second = -(-size // alignment) * alignment
    path = write(
        gguf(
            keys, [tensor(b"x", (9,)), tensor(b"y", (9,), second)], bytes(second + size), alignment=alignment
        )
    )
    model = read_model_file(path)
    assert stock_accepts(path)
    assert model.alignment == alignment
    assert model.tensors[1].offset + size == path.stat().st_size


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


# What cannot be run


def test_vocabulary_only_cannot_generate(write):
    model = read_model_file(write(gguf()))
    with pytest.raises(ModelFileError, match="has a vocabulary only, no weights"):
        model.check_can_generate()


@pytest.mark.parametrize(
    "architecture, causal, words",
    [
        (b"nomic-bert", None, "'nomic-bert' is an encoder"),
        (b"t5", None, "'t5' is an encoder-decoder"),
        (b"llada", None, "'llada' is a diffusion language model"),
        (b"clip", None, "'clip' is a part that works only beside another model"),
        (b"qwen3", b"\0", "'qwen3' is an encoder"),
    ],
)
def test_models_that_are_not_causal(architecture, causal, words, write):
    keys = [key(b"general.architecture", STRING, string(architecture))]
    if causal is not None:
        keys.append(key(architecture + b".attention.causal", 7, causal))
    model = read_model_file(write(gguf(keys, [ONE_TENSOR], DATA)))
    assert not model.is_causal
    with pytest.raises(ModelFileError, match=words):
        model.check_can_generate()


def test_unknown_architecture_is_left_to_llama_cpp(write):
    keys = [key(b"general.architecture", STRING, string(b"new-one"))]
    model = read_model_file(write(gguf(keys, [ONE_TENSOR], DATA)))
    assert (model.architecture, model.is_causal, model.name) == ("new-one", True, "model")
    with pytest.raises(ModelFileError, match="has no tensor 'nope' among its 1"):
        model.tensor("nope")


# Cost


def test_large_vocabulary_is_checked_and_not_kept(write):
    tokens = b"".join(string(b"token %d" % n) for n in range(128_000))
    merges = b"".join(string(b"ab%d cd%d" % (n, n)) for n in range(280_000))
    keys = [
        ARCHITECTURE,
        array(TOKENS, STRING, 128_000, tokens),
        array(b"tokenizer.ggml.scores", 6, 128_000, bytes(4 * 128_000)),
        array(b"tokenizer.ggml.merges", STRING, 280_000, merges),
        u32(b"last", 7),
    ]
    path = write(gguf(keys))
    tracemalloc.start()
    model = read_model_file(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (model.vocab_size, model.metadata["last"]) == (128_000, 7)
    assert model.metadata["tokenizer.ggml.merges"] == GGUFArray("str", 280_000, None)
    assert kept < 1 << 20 and peak < 24 << 20


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="no /proc/self/io to count the bytes read")
def test_weights_are_not_read(write):
    path = write(gguf(tensors=[tensor(b"x", (1 << 30,), 0, F32)]))
    os.truncate(path, path.stat().st_size + (4 << 30))  # sparse

    def bytes_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = bytes_read()
    header = read_header(path)
    assert header.tensors[0].nbytes == 4 << 30
    assert bytes_read() - before < 2 << 20
