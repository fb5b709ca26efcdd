"""Files that are damaged, contradict themselves or are hostile: what is wrong, and where, is said."""

import copy
import functools
import json
import random

import pytest
from trained_tokenizers import (
    GPT2,
    SPACES_WITH_ONE_BEFORE,
    added_token,
    as_tokenizer_json,
    train_byte_level,
    train_sentencepiece,
    write_folder,
)

from edgeinfer.errors import ExportError
from edgeinfer.exporters import tokenizer_files
from edgeinfer.exporters.vocabulary import read_vocabulary


@functools.cache
def trained():
    return train_byte_level(GPT2, size=300)


@functools.cache
def model():
    return train_sentencepiece(vocab_size=600)


def changed(path, value):
    """The tokenizer.json with one thing changed: changed(("model", "vocab"), {})."""
    document = copy.deepcopy(trained())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def with_tokens(**tokens):
    """Further tokens in the vocabulary; None takes one away."""
    vocabulary = {**trained()["model"]["vocab"], **tokens}
    return changed(
        ("model", "vocab"), {text: token for text, token in vocabulary.items() if token is not None}
    )


@pytest.mark.parametrize(
    "document, message",
    [
        (with_tokens(new=305), "tokenizer.json: vocab: no token has the id 300, though ids go up to 305"),
        (with_tokens(new=17), "vocab: id 17 is both '.' and 'new'"),
        (with_tokens(new=-1), "the id of 'new' is -1, expected a whole number"),
        (with_tokens(new=2.0), "the id of 'new' is 2.0, expected a whole number"),
        (with_tokens(new=1 << 60), "the id of 'new' is 1152921504606846976"),
        (with_tokens(**{"x" * 2000: 300}), "is not Unicode text of at most 1,024 characters"),
        (with_tokens(**{"\ud800": 300}), "is not Unicode text"),
        (with_tokens(**{"a\0": 300}), "holds a zero byte"),
        (with_tokens(**{"": 300}), "token 300 is an empty text"),
        (changed(("model", "vocab"), ["a"]), "vocab: expected the vocabulary as a JSON object"),
        (changed(("model", "merges"), ["a b c"]), "merges: merge 0 is 'a b c', expected two tokens"),
        (changed(("model", "merges"), [["a"]]), "merge 0 is .*expected two tokens"),
        (
            changed(("model", "merges"), ["Ġ t", "q zzz"]),
            "merge 1, 'q zzz', needs the token 'zzz', which is not there",
        ),
        (changed(("model", "merges"), ["ĉ ĉ"]), "needs the token 'ĉĉ', which is not there"),
        (changed(("model", "merges"), None), "merges: expected a list of merges, found NoneType"),
        (changed(("model",), None), "tokenizer.json: has no model"),
        (changed(("model", "type"), "Unigram"), "the tokenizer's model is Unigram, expected BPE"),
        (changed(("model", "dropout"), 0.1), "sets dropout to '0.1', which llama.cpp lacks"),
        (changed(("model", "end_of_word_suffix"), "</w>"), "sets end_of_word_suffix"),
        (changed(("pre_tokenizer",), None), "neither byte-level .* nor has it byte_fallback"),
        (changed(("added_tokens", 0, "id"), 5), "'<|endoftext|>' has the ids 0 and 5"),
        (changed(("added_tokens", 0), {"content": "x"}), "added_tokens: expected an id and a content"),
        (changed(("added_tokens",), {"a": 1}), "added_tokens: expected a list, found dict"),
        (
            changed(("added_tokens",), [added_token(400, "<x>")]),
            "'<x>' has the id 400, but the tokens before it end at 299",
        ),
        (changed(("added_tokens",), [added_token(40, "<x>")]), "id 40 is .* and also the added token '<x>'"),
    ],
)
def test_a_tokenizer_json_that_is_wrong(document, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_vocabulary(write_folder(tmp_path / "a", document), {})


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tokenizer.json", b'{"model": ', "tokenizer.json: is not JSON .*char 10.* get it again"),
        ("tokenizer.json", b"[" * 200_000, "tokenizer.json: is not JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json: expected a JSON object, found list"),
        ("tokenizer.json", b'{"a": "\xff"}', "tokenizer.json: is not UTF-8 text"),
        ("tokenizer_config.json", b"{'a': 1}", "tokenizer_config.json: is not JSON"),
        ("generation_config.json", b"", "generation_config.json: is not JSON"),
        ("tokenizer.model", b"\x00\x01\x02", "tokenizer.model: is not a SentencePiece model"),
        ("tokenizer.model", b"", "tokenizer.model: is not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "It is in tiktoken's format: add the tokenizer.json"),
        ("tekken.json", b"{}", "found no tokenizer.* makes a tokenizer.json"),
    ],
)
def test_a_file_that_cannot_be_read(name, text, message, tmp_path):
    folder = write_folder(tmp_path / "a", None if name.startswith(("tokenizer.", "tekken")) else trained())
    (folder / name).write_bytes(text)
    with pytest.raises(ExportError, match=message):
        read_vocabulary(folder, {})


def test_no_folder(tmp_path):
    with pytest.raises(ExportError, match="there is no such folder"):
        read_vocabulary(tmp_path / "none", {})


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", trained())
    monkeypatch.setattr(tokenizer_files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match="tokenizer.json: has more than 1,000 bytes"):
        read_vocabulary(folder, {})


@pytest.mark.parametrize(
    "size, found", [(0, "0"), (-1, "-1"), (10**9, "1000000000"), ("7", "7"), (True, "True"), (2.5, "2.5")]
)
def test_a_vocab_size_that_is_no_count(size, found, tmp_path):
    with pytest.raises(
        ExportError, match=f"config.json: vocab_size is {found}, expected a count from 1 to 1,048,576"
    ):
        read_vocabulary(write_folder(tmp_path / "a", trained()), {"vocab_size": size})


def test_more_tokens_than_rows(tmp_path):
    with pytest.raises(
        ExportError, match="the tokenizer has 300 tokens, but config.json says vocab_size 299"
    ):
        read_vocabulary(write_folder(tmp_path / "a", trained()), {"vocab_size": 299})


def test_files_that_name_different_ids(tmp_path):
    settings = {"added_tokens_decoder": {"7": added_token(7, "<|endoftext|>")}}
    folder = write_folder(tmp_path / "a", trained(), tokenizer_config=settings)
    with pytest.raises(ExportError, match="added_tokens_decoder: '<|endoftext|>' has the id 7, elsewhere 0"):
        read_vocabulary(folder, {})


def test_nothing_but_an_export_error_comes_of_a_damaged_model(tmp_path):
    random_ = random.Random(4)
    num_read = 0
    folder = write_folder(tmp_path / "a")
    for attempt in range(150):
        data = bytearray(model())
        for _ in range(random_.randint(1, 4)):
            data[random_.randrange(len(data))] = random_.randrange(256)
        (folder / "tokenizer.model").write_bytes(
            data[: random_.randrange(len(data)) if attempt % 3 == 0 else None]
        )
        try:
            num_read += read_vocabulary(folder, {}).size > 0
        except ExportError as error:
            assert "tokenizer.model" in str(error) or str(folder) in str(error)
    assert 0 < num_read < 150


JUNK = [
    None,
    True,
    -1,
    3.5,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    {},
    [1],
    [None],
    {"a": 1},
    {"type": "x"},
    [[]],
    [{}],
    "\0",
]


def places(value, path=()):
    """The path of every part of a JSON document; of long lists and objects the first few."""
    yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in [*keys[:8], *keys[-1:]]:
        yield from places(value[key], (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], junk)
    return value


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_nothing_but_an_export_error_comes_of_odd_json(kind, tmp_path):
    tokenizer = trained() if kind == "byte-level" else as_tokenizer_json(model(), SPACES_WITH_ONE_BEFORE)
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    documents = {
        "tokenizer": tokenizer | {"post_processor": {"type": "TemplateProcessing", "single": single}},
        "tokenizer_config": {
            "eos_token": {"content": "</s>"}, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {"0": tokenizer["added_tokens"][0]}, "additional_special_tokens": ["<s>"],
            "chat_template": [{"name": "default", "template": "x"}],
        },
        "generation_config": {"eos_token_id": [2, 1]},
        "special_tokens_map": {"eos_token": "</s>"},
        "config": {"vocab_size": 700, "eos_token_id": 2, "text_config": {"vocab_size": 3}},
    }  # fmt: skip
    random_ = random.Random(5)
    results = {"read": 0, "refused": 0}
    folder = write_folder(tmp_path / "a", **documents)
    for name, document in documents.items():
        for path in places(document):
            broken = replaced(document, path, random_.choice(JUNK))
            write_folder(folder, **{name: broken})
            try:
                config = broken if name == "config" and path else documents["config"]
                results["read"] += read_vocabulary(folder, config).size > 0
            except ExportError:
                results["refused"] += 1
        write_folder(folder, **{name: document})
    assert min(results.values()) > 20, json.dumps(results)
