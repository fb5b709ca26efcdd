"""Special tokens, chat templates, sizes and types of an exported vocabulary."""

import functools
import json

import gguf
import pytest
from trained_tokenizers import (
    GPT2,
    SPACES_WITH_ONE_BEFORE,
    added_token,
    as_tokenizer_json,
    stock_of,
    train_byte_level,
    train_sentencepiece,
    write_folder,
    write_gguf,
)

from edgeinfer.errors import ExportError
from edgeinfer.exporters.vocabulary import read_vocabulary

NAMES = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<stop a>",
    "<stop b>",
    "<stop c>",
    "<pad>",
]
BOS, EOS, EOT, EOM, STOP_A, STOP_B, STOP_C, PAD = range(8)


@functools.cache
def byte_level():
    return train_byte_level(GPT2, specials=NAMES, size=300)


@functools.cache
def llama():
    return as_tokenizer_json(train_sentencepiece(vocab_size=1000), SPACES_WITH_ONE_BEFORE)


def without(document, *texts):
    """The same tokens, of which some are not called special."""
    return document | {
        "added_tokens": [token for token in document["added_tokens"] if token["content"] not in texts]
    }


def template(before=(), after=()):
    """A post-processor that adds special tokens around text, beside one that adds none."""
    special = [{"SpecialToken": {"id": text, "type_id": 0}} for text in (*before, *after)]
    single = [*special[: len(before)], {"Sequence": {"id": "A", "type_id": 0}}, *special[len(before) :]]
    processor = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    return {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}


def metadata_of(folder, config=None):
    """Without the prefix of the keys, and without lists."""
    metadata = read_vocabulary(folder, config or {}).metadata
    return {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if not isinstance(value, list)
    }


def test_ids_by_the_tokenizers_own_names(tmp_path):
    settings = {
        "bos_token": NAMES[BOS],
        "eos_token": {"content": NAMES[EOT], "lstrip": False},
        "pad_token": NAMES[PAD],
    }
    config = {"bos_token_id": 200, "eos_token_id": [201, 202], "pad_token_id": 203}
    found = metadata_of(write_folder(tmp_path / "a", byte_level(), tokenizer_config=settings), config)
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (BOS, EOT, PAD)


def test_ids_by_special_tokens_map(tmp_path):
    names = {"bos_token": NAMES[BOS], "eos_token": NAMES[EOS], "unk_token": NAMES[STOP_A]}
    found = metadata_of(
        write_folder(tmp_path / "a", byte_level(), special_tokens_map=names), {"eos_token_id": 7}
    )
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (BOS, EOS, STOP_A)


def test_ids_by_the_models_files_where_the_tokenizer_has_no_names(tmp_path):
    folder = write_folder(tmp_path / "a", byte_level(), generation_config={"eos_token_id": [EOS, EOT]})
    found = metadata_of(folder, {"bos_token_id": BOS, "eos_token_id": 5, "pad_token_id": None})
    assert (found["bos_token_id"], found["eos_token_id"]) == (BOS, EOS)
    assert "padding_token_id" not in found


def test_ids_that_no_token_has_do_not_count(tmp_path):
    config = {
        "bos_token_id": -1,
        "eos_token_id": [99_999, EOS],
        "pad_token_id": True,
        "text_config": {"pad_token_id": PAD},
    }
    found = metadata_of(write_folder(tmp_path / "a", byte_level()), config)
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (BOS, EOS, PAD)


def test_ends_of_turn_and_message_are_found_by_name(tmp_path):
    found = metadata_of(
        write_folder(tmp_path / "a", byte_level(), tokenizer_config={"eos_token": NAMES[EOS]})
    )
    assert (found["eot_token_id"], found["eom_token_id"]) == (EOT, EOM)


def test_further_ends_that_the_model_lists_are_ends_in_llama_cpp(tmp_path):
    import llama_cpp

    document = without(byte_level(), NAMES[EOT], NAMES[EOM])
    folder = write_folder(tmp_path / "a", document, tokenizer_config={"eos_token": NAMES[EOS]})
    config = {"eos_token_id": [EOS, STOP_A, STOP_B, STOP_C]}
    with stock_of(folder, config) as (vocabulary, stock):
        ends = {token for token in range(8) if llama_cpp.llama_vocab_is_eog(stock.vocab, token)}
        assert ends >= {EOS, STOP_A, STOP_B}
        assert STOP_C not in ends
        assert any(
            "'<stop c>'. llama.cpp will not stop at them" in warning for warning in vocabulary.warnings
        )


def test_no_end_is_warned_of(tmp_path):
    document = train_byte_level(GPT2, specials=["<x>"], size=300)
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert any("No end-of-text token is known" in warning for warning in vocabulary.warnings)


@pytest.mark.parametrize(
    "settings, processor, expected",
    [
        ({}, template(["<|begin_of_text|>"]), (True, False)),
        ({}, template(["<|begin_of_text|>"], ["<|end_of_text|>"]), (True, True)),
        ({}, template(), (False, False)),
        ({}, None, (False, False)),
        ({"add_bos_token": False}, template(["<|begin_of_text|>"]), (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, template(), (False, False)),
    ],
)
def test_whether_begin_and_end_are_added(settings, processor, expected, tmp_path):
    """As transformers does, and llama.cpp then adds the same."""
    from transformers import AutoTokenizer

    names = {"bos_token": NAMES[BOS], "eos_token": NAMES[EOS], "tokenizer_class": "PreTrainedTokenizerFast"}
    document = byte_level() | {"post_processor": processor}
    if processor:
        around = processor["processors"][1]
        around["special_tokens"] = {
            NAMES[token]: {"id": NAMES[token], "ids": [token], "tokens": [NAMES[token]]}
            for token in (BOS, EOS)
        }
        around["pair"] = [*around["single"], {"Sequence": {"id": "B", "type_id": 1}}]
        processor["processors"][0] = GPT2
    folder = write_folder(tmp_path / "a", document, tokenizer_config=names | settings)
    original = AutoTokenizer.from_pretrained(folder)
    with stock_of(folder) as (vocabulary, stock):
        flags = [vocabulary.metadata[f"tokenizer.ggml.add_{kind}_token"] for kind in ("bos", "eos")]
        assert tuple(flags) == expected
        assert stock.ids("some text", add_special=True) == original.encode("some text")


@pytest.mark.parametrize("bos, eos", [(True, False), (False, True), (True, None), (None, True)])
def test_settings_count_where_no_tokenizer_json_is(bos, eos, tmp_path):
    from transformers import AutoTokenizer

    settings = {
        "add_bos_token": bos,
        "add_eos_token": eos,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    model = train_sentencepiece(vocab_size=1000)
    folder = write_folder(
        tmp_path / "a", model=model, tokenizer_config=settings, config={"model_type": "llama"}
    )
    original = AutoTokenizer.from_pretrained(folder)
    with stock_of(folder) as (vocabulary, stock):
        found = [vocabulary.metadata[f"tokenizer.ggml.add_{kind}_token"] for kind in ("bos", "eos")]
        assert found == [bool(bos), bool(eos)]
        assert stock.ids("some text", add_special=True) == original.encode("some text")
        assert any("No file says whether" in warning for warning in vocabulary.warnings) == (bos is None)


def test_settings_that_tokenizer_json_does_not_follow_are_warned_of(tmp_path):
    folder = write_folder(tmp_path / "a", llama(), tokenizer_config={"add_bos_token": True})
    vocabulary = read_vocabulary(folder, {})
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is False
    assert any("adds a bos token to text, but tokenizer.json does not" in w for w in vocabulary.warnings)


def test_more_than_begin_and_end_around_text_is_warned_of(tmp_path):
    document = byte_level() | {"post_processor": template(["<stop a>", "<|begin_of_text|>"])}
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert any("puts <stop a> <|begin_of_text|> around text" in warning for warning in vocabulary.warnings)
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is True


def test_a_begin_that_is_not_known_is_not_added(tmp_path):
    document = train_byte_level(GPT2, specials=["<|endoftext|>"], size=300)
    settings = {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    folder = write_folder(tmp_path / "a", vocab=document["model"]["vocab"], tokenizer_config=settings)
    (folder / "merges.txt").write_text("", encoding="utf-8")
    vocabulary = read_vocabulary(folder, {})
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is False
    assert any("adds a bos token to text, but no file says which that is" in w for w in vocabulary.warnings)


def test_types_of_tokens(tmp_path):
    document = json.loads(json.dumps(byte_level()))
    size = len(document["model"]["vocab"])
    document["added_tokens"].append(added_token(size, "<user>", special=False))
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {"vocab_size": size + 3})
    types = vocabulary.metadata["tokenizer.ggml.token_type"]
    assert types[BOS] == gguf.TokenType.CONTROL
    assert types[size - 1] == gguf.TokenType.NORMAL
    assert types[size:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]
    assert vocabulary.size == len(types) == len(vocabulary.metadata["tokenizer.ggml.tokens"]) == size + 3


def test_tokens_that_are_special_by_name_only(tmp_path):
    document = without(byte_level(), *NAMES)
    names = {"eos_token": NAMES[EOS], "additional_special_tokens": [{"content": NAMES[STOP_A]}]}
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document, tokenizer_config=names), {})
    control = [
        t
        for t, kind in enumerate(vocabulary.metadata["tokenizer.ggml.token_type"])
        if kind == gguf.TokenType.CONTROL
    ]
    assert control == [EOS, STOP_A]


def test_added_tokens_of_all_files(tmp_path):
    """tokenizer.json first, then added_tokens_decoder, then added_tokens.json."""
    document = llama()
    size = len(document["model"]["vocab"])
    document = document | {"added_tokens": document["added_tokens"] + [added_token(size, "<a>")]}
    decoder = {
        str(size): added_token(size, "<a>", special=False),
        str(size + 1): added_token(size + 1, "<b>"),
    }
    folder = write_folder(
        tmp_path / "a",
        document,
        tokenizer_config={"added_tokens_decoder": decoder},
        added_tokens={"<c>": size + 2},
    )
    metadata = read_vocabulary(folder, {}).metadata
    assert metadata["tokenizer.ggml.tokens"][size:] == ["<a>", "<b>", "<c>"]
    kinds = gguf.TokenType
    assert metadata["tokenizer.ggml.token_type"][size:] == [kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED]
    assert len(metadata["tokenizer.ggml.scores"]) == size + 3


def test_unused_tokens_do_not_clash_with_others(tmp_path):
    document = json.loads(json.dumps(byte_level()))
    size = len(document["model"]["vocab"])
    document["added_tokens"].append(added_token(size, f"[PAD{size + 1}]"))
    with stock_of(write_folder(tmp_path / "a", document), {"vocab_size": size + 2}) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.tokens"][-2:] == [f"[PAD{size + 1}]", f"[[PAD{size + 1}]]"]
        assert stock.ids(f"[PAD{size + 1}]") == [size]


def test_added_tokens_without_rows_are_left_out(tmp_path):
    """gemma 3 1B: the tokenizer has a token for images, the model has no row for it."""
    document = json.loads(json.dumps(byte_level()))
    size = len(document["model"]["vocab"])
    document["added_tokens"].append(added_token(size, "<image>"))
    folder = write_folder(tmp_path / "a", document)
    vocabulary = read_vocabulary(folder, {"text_config": {"vocab_size": size}})
    assert vocabulary.size == size
    assert any("1 added token(s) are left out" in w and "'<image>'" in w for w in vocabulary.warnings)
    write_folder(folder, tokenizer_config={"eos_token": "<image>"})
    with pytest.raises(ExportError, match=f"{size + 1} tokens, but config.json says vocab_size {size}"):
        read_vocabulary(folder, {"vocab_size": size})


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_chat_template_of_tokenizer_config(tmp_path):
    folder = write_folder(tmp_path / "a", byte_level(), tokenizer_config={"chat_template": CHAT})
    assert read_vocabulary(folder, {}).metadata["tokenizer.chat_template"] == CHAT
    write_folder(folder, chat_template={"chat_template": CHAT + "json"})
    assert read_vocabulary(folder, {}).metadata["tokenizer.chat_template"] == CHAT + "json"
    (folder / "chat_template.jinja").write_text(CHAT + "é", encoding="utf-8")
    assert read_vocabulary(folder, {}).metadata["tokenizer.chat_template"] == CHAT + "é"


@pytest.mark.parametrize("way", ["list", "files"])
def test_named_chat_templates_are_as_the_gguf_package_writes_them(way, tmp_path):
    named = {"default": CHAT, "tool_use": CHAT + "tools", "rag-2": CHAT + "rag"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    folder = write_folder(
        tmp_path / "a", byte_level(), tokenizer_config={"chat_template": listed if way == "list" else None}
    )
    if way == "files":
        (folder / "chat_template.jinja").write_text(named.pop("default"), encoding="utf-8")
        (folder / "additional_chat_templates").mkdir()
        for name, text in named.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
    writer = gguf.GGUFWriter(tmp_path / "expected.gguf", "llama")
    writer.add_chat_template(listed)
    expected = {key: field.value for key, field in writer.kv_data[0].items() if "chat_template" in key}
    writer.close()
    found = {
        key: value for key, value in read_vocabulary(folder, {}).metadata.items() if "chat_template" in key
    }
    for metadata in (expected, found):
        metadata["tokenizer.chat_templates"] = sorted(metadata["tokenizer.chat_templates"])
    assert found == expected


@pytest.mark.parametrize(
    "template", [7, [{"name": 1}], [{"name": "a", "template": None}], "x" * (1 << 20) + "x", "\ud800"]
)
def test_chat_templates_that_are_no_text(template, tmp_path):
    folder = write_folder(tmp_path / "a", byte_level(), tokenizer_config={"chat_template": template})
    with pytest.raises(ExportError, match="tokenizer_config.json: .*chat template"):
        read_vocabulary(folder, {})


def test_what_is_written_is_read_back(tmp_path):
    folder = write_folder(tmp_path / "a", llama(), tokenizer_config={"chat_template": CHAT})
    vocabulary = read_vocabulary(folder, {})
    reader = gguf.GGUFReader(write_gguf(vocabulary, tmp_path / "a.gguf"))
    read = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    assert read == vocabulary.metadata
