"""The model file reader against the gguf package and stock llama.cpp, and what it costs."""

import ctypes
import os
import tracemalloc

import gguf as gguf_package
import pytest
from gguf_bytes import (
    ARCHITECTURE,
    F32,
    STRING,
    array,
    data_folder,
    gguf,
    key,
    libggml,
    stock_accepts,
    stock_contents,
    string,
    tensor,
    u32,
)
from modelfile_cases import DATA, ONE_TENSOR, TOKENS, write_with_package

from edgeinfer.errors import ModelFileError
from edgeinfer.ggml_types import GGML_TYPES, REMOVED_TYPES
from edgeinfer.gguf_header import read_header
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


def test_version_2_equals_gguf_package(tmp_path):
    path = tmp_path / "v2.gguf"
    write_with_package(path)
    path.write_bytes(path.read_bytes().replace(b"GGUF\3", b"GGUF\2", 1))
    model = assert_equals_reference(path)
    assert model.version == 2
    assert model.chat_template == "{{ messages }}"
    assert model.metadata["test.words"] == GGUFArray("str", 2, ("one", "two"))
    assert model.tensor("blk.1.attn_q.bias").role == "attn_q.bias"


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
