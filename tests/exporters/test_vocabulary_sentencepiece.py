"""SentencePiece BPE: llama.cpp, with what was exported, splits text as sentencepiece and tokenizers do."""

import functools
import json
import sys

import pytest
import sentencepiece
from tokenizers import Tokenizer
from trained_tokenizers import (
    GEMMA,
    SPACE,
    SPACES,
    SPACES_WITH_ONE_BEFORE,
    added_token,
    as_tokenizer_json,
    assert_same_ids,
    book_texts,
    needs_data,
    odd_texts,
    parse_model,
    stock_of,
    train_sentencepiece,
    write_folder,
)

from edgeinfer.errors import ExportError
from edgeinfer.exporters.vocabulary import read_vocabulary

KINDS = {"llama": ({}, SPACES_WITH_ONE_BEFORE), "gemma": (GEMMA, SPACES)}
SPECIALS = {"llama": ["<s>", "</s>", "<unk>"], "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<table>"]}


@functools.cache
def model_of(kind):
    return train_sentencepiece(**KINDS[kind][0])


@functools.cache
def json_of(kind):
    return as_tokenizer_json(model_of(kind), KINDS[kind][1])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=["tokenizer.model", "tokenizer.json", "both"])
def folder(request, kind, tmp_path):
    model = model_of(kind) if request.param != "tokenizer.json" else None
    document = json_of(kind) if request.param != "tokenizer.model" else None
    return write_folder(tmp_path / "a", document, model, tokenizer_config={"add_bos_token": False})


def by_sentencepiece(kind):
    return sentencepiece.SentencePieceProcessor(model_proto=model_of(kind)).encode


def by_tokenizers(document, split_special=False):
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = split_special
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_sentencepiece(kind, folder):
    with stock_of(folder) as (vocabulary, stock):
        assert vocabulary.warnings == ()
        assert vocabulary.metadata["tokenizer.ggml.model"] == "llama"
        assert vocabulary.metadata["tokenizer.ggml.add_space_prefix"] == (kind == "llama")
        # <end_of_turn> counts as special for llama.cpp whatever its type is, and is not looked for then.
        assert_same_ids(stock, by_sentencepiece(kind), odd_texts(SPECIALS[kind]), parse_special=False)


def test_ids_are_those_of_tokenizers(kind, folder):
    with stock_of(folder) as (_, stock):
        texts = list(odd_texts(SPECIALS[kind]))
        assert_same_ids(stock, by_tokenizers(json_of(kind)), texts)
        assert_same_ids(stock, by_tokenizers(json_of(kind), split_special=True), texts, parse_special=False)


@needs_data
@pytest.mark.parametrize("from_json", [False, True])
def test_ids_on_books(kind, from_json, tmp_path):
    content = {"tokenizer": json_of(kind)} if from_json else {"model": model_of(kind)}
    with stock_of(write_folder(tmp_path / "a", **content)) as (_, stock):
        assert_same_ids(stock, by_sentencepiece(kind), book_texts(), parse_special=False)


def test_both_files_give_the_same_vocabulary_but_scores(kind, tmp_path):
    model = read_vocabulary(write_folder(tmp_path / "a", model=model_of(kind)), {}).metadata
    json = read_vocabulary(write_folder(tmp_path / "b", json_of(kind)), {}).metadata
    for key in ("tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"):
        assert model[f"tokenizer.ggml.{key}"] == json[f"tokenizer.ggml.{key}"]


def test_types_are_those_of_the_pieces(tmp_path):
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", model=model_of("llama")), {})
    pieces = parse_model(model_of("llama")).pieces
    assert vocabulary.metadata["tokenizer.ggml.token_type"] == [piece.type for piece in pieces]
    assert vocabulary.metadata["tokenizer.ggml.scores"] == [piece.score for piece in pieces]


def test_pieces_are_the_text(kind, folder):
    with stock_of(folder) as (_, stock):
        text = "Tabs\t and    spaces,\n\n\n  é 👍🏽 你好"
        prefix = " " if kind == "llama" else ""
        assert b"".join(map(stock.piece, stock.ids(text))) == (prefix + text).encode()


PHI3 = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]


def phi3():
    """llama's pieces with the added tokens of phi 3, which take the spaces after them away."""
    document = json.loads(json.dumps(json_of("llama")))
    document["added_tokens"][2] |= {"special": False, "rstrip": True}
    size = len(document["model"]["vocab"])
    document["added_tokens"] += [
        added_token(size + place, text, rstrip=text != "<|endoftext|>") for place, text in enumerate(PHI3)
    ]
    return document


@pytest.mark.parametrize("name", ["phi-3", "my finetune"])
def test_phi3_takes_spaces_after_special_tokens_away(name, tmp_path):
    document = phi3()
    settings = {"eos_token": "<|endoftext|>"}
    folder = write_folder(tmp_path / "a", document, tokenizer_config=settings)
    with stock_of(folder, name=name) as (vocabulary, stock):
        assert vocabulary.strips and vocabulary.warnings == ()
        assert "phi-3" in vocabulary.name_for(name)
        texts = [f"<|user|>\n Hi there<|end|>\n\n<|assistant|> \n x {text}" for text in odd_texts(PHI3)]
        assert_same_ids(stock, by_tokenizers(document), texts)
    ends = [vocabulary.metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot")]
    assert [vocabulary.metadata["tokenizer.ggml.tokens"][token] for token in ends] == [
        "<|endoftext|>",
        "<|end|>",
    ]


def test_a_name_with_phi3_strips_nothing_where_the_tokenizer_does_not(kind, tmp_path):
    folder = write_folder(tmp_path / "a", json_of(kind))
    with stock_of(folder, name="tiny-phi3") as (vocabulary, stock):
        assert vocabulary.name_for("tiny-Phi3") == "tiny-phi 3"
        assert_same_ids(stock, by_tokenizers(json_of(kind)), odd_texts(SPECIALS[kind]))


def test_other_tokens_that_take_spaces_away_are_warned_of(tmp_path):
    document = json.loads(json.dumps(json_of("llama")))
    document["added_tokens"].append(added_token(len(document["model"]["vocab"]), "<mask>", lstrip=True))
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert any("'<mask>' take the spaces" in warning for warning in vocabulary.warnings)
    assert not vocabulary.strips


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(scheme, tmp_path):
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    document = as_tokenizer_json(model_of("llama"), None, metaspace)
    with stock_of(write_folder(tmp_path / "a", document)) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.add_space_prefix"] == (scheme != "never")
        warned = " ".join(vocabulary.warnings)
        assert ("begins with a space" in warned) == (scheme != "never")
        assert ("after a special token" in warned) == (scheme == "first")
        texts = [text for text in odd_texts() if scheme == "never" or text[:1] not in (" ", SPACE)]
        assert_same_ids(stock, by_tokenizers(document), texts)


def test_where_llama_cpp_puts_another_space(tmp_path):
    """If this fails, llama.cpp has become exact: the warning can go."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    document = as_tokenizer_json(model_of("llama"), None, metaspace)
    with stock_of(write_folder(tmp_path / "a", document)) as (_, stock):
        for text in (" the", "a</s>b"):
            assert stock.ids(text) != by_tokenizers(document)(text)


def test_metaspace_that_splits(tmp_path):
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    folder = write_folder(tmp_path / "a", as_tokenizer_json(model_of("llama"), None, metaspace))
    with pytest.raises(
        ExportError, match="Metaspace splits text at spaces, but the token '▁▁' reaches over one"
    ):
        read_vocabulary(folder, {})
    apart = train_sentencepiece(allow_whitespace_only_pieces=False)
    document = as_tokenizer_json(apart, None, metaspace)
    with stock_of(write_folder(tmp_path / "b", document)) as (_, stock):
        texts = [text for text in odd_texts() if text[:1] not in (" ", SPACE)]
        assert_same_ids(stock, by_tokenizers(document), texts)


@pytest.mark.parametrize(
    "settings, prefix, warnings",
    [
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, True, 2),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, True, 1),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, False, 0),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True, 0),
    ],
)
def test_spaces_by_the_class_of_transformers(settings, prefix, warnings, tmp_path):
    from transformers import AutoTokenizer

    config = {"model_type": "llama"}
    folder = write_folder(tmp_path / "a", json_of("llama"), tokenizer_config=settings, config=config)
    original = AutoTokenizer.from_pretrained(folder)
    with stock_of(folder, config) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.add_space_prefix"] == prefix
        assert len(vocabulary.warnings) == warnings
        texts = [text for text in odd_texts() if warnings == 0 or text[:1] not in (" ", SPACE)]
        assert_same_ids(stock, lambda text: original.encode(text, add_special_tokens=False), texts)


def test_files_that_transformers_wrote(kind, tmp_path):
    from transformers import AutoTokenizer

    config = {"model_type": "gemma2" if kind == "gemma" else "llama"}
    settings = {"tokenizer_class": "GemmaTokenizer" if kind == "gemma" else "LlamaTokenizer"}
    source = write_folder(tmp_path / "a", json_of(kind), tokenizer_config=settings, config=config)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "b")
    folder = write_folder(tmp_path / "b", config=config)
    original = AutoTokenizer.from_pretrained(folder)
    with stock_of(folder, config) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.eos_token_id"] == original.eos_token_id
        texts = [text for text in odd_texts() if kind == "gemma" or text[:1] not in (" ", SPACE)]
        assert_same_ids(stock, lambda text: original.encode(text, add_special_tokens=False), texts)


def test_merges_that_are_no_scores_are_warned_of(tmp_path):
    document = json.loads(json.dumps(json_of("llama")))
    made = {}
    for left, right in document["model"]["merges"]:
        made.setdefault(left + right, [left, right])
    document["model"]["merges"] = list(made.values())  # one way to each token, as BpeTrainer has it
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert any(
        "merges of this tokenizer cannot be written as scores" in warning for warning in vocabulary.warnings
    )


def test_a_stale_tokenizer_model_gives_way(tmp_path):
    document = as_tokenizer_json(train_sentencepiece(vocab_size=2000), SPACES_WITH_ONE_BEFORE)
    with stock_of(write_folder(tmp_path / "a", document, model_of("llama"))) as (vocabulary, stock):
        assert vocabulary.warnings == (
            "tokenizer.model holds other tokens than tokenizer.json. The latter was used",
        )
        assert_same_ids(stock, by_tokenizers(document), odd_texts(SPECIALS["llama"]))


def test_without_the_sentencepiece_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ExportError,
        match=r'tokenizer.model: reading it needs sentencepiece: pip install "edgeinfer\[export\]"',
    ):
        read_vocabulary(write_folder(tmp_path / "a", model=model_of("llama")), {})


def test_special_tokens_that_are_normalized_are_warned_of(tmp_path):
    """As in the first tokenizer.json of llama 2."""
    document = json.loads(json.dumps(json_of("llama")))
    for token in document["added_tokens"]:
        token["normalized"] = True
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert any("only at the start of text or after a space" in w for w in vocabulary.warnings)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram"}, "of type UNIGRAM, expected BPE"),
        ({"byte_fallback": False}, r"no token for \d+ of the 256 bytes.*byte_fallback"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces differently"),
    ],
)
def test_models_that_llama_cpp_cannot_follow(options, message, tmp_path):
    folder = write_folder(tmp_path / "a", model=train_sentencepiece(vocab_size=1500, **options))
    with pytest.raises(ExportError, match=message):
        read_vocabulary(folder, {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
    ],
)
def test_models_that_change_text_are_warned_of(options, message, tmp_path):
    model = train_sentencepiece(vocab_size=1500, **options)
    folder = write_folder(tmp_path / "a", model=model, tokenizer_config={"add_bos_token": False})
    with stock_of(folder) as (vocabulary, stock):
        assert [message in warning for warning in vocabulary.warnings] == [True]
        original = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert_same_ids(stock, original.encode, ["Plain words with one space between, such as 12 of them."])


@pytest.mark.parametrize(
    "part, message",
    [
        ({"normalizer": {"type": "Lowercase"}}, 'the normalizer {"type": "Lowercase"} changes text'),
        ({"normalizer": None}, "spaces are not turned into '▁'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 'the pre_tokenizer {"type": "Whitespace"} changes text'),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(part, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_vocabulary(write_folder(tmp_path / "a", json_of("llama") | part), {})
