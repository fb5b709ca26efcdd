"""Byte-level BPE: llama.cpp, with what was exported, splits text as the tokenizers library does."""

import functools
import json
import unicodedata

import llama_cpp
import pytest
from tokenizers import Tokenizer
from trained_tokenizers import (
    BYTES_ONLY,
    GPT2,
    LLAMA3,
    QWEN2,
    added_token,
    assert_same_ids,
    book_texts,
    needs_data,
    odd_texts,
    sequence,
    split,
    stock_of,
    train_byte_level,
    untrained,
    write_folder,
)

from edgeinfer.engines.llama import LlamaModel
from edgeinfer.errors import ExportError
from edgeinfer.exporters.bpe_vocabulary import byte_letters
from edgeinfer.exporters.pretokenizers import known_pretokenizers
from edgeinfer.exporters.vocabulary import read_vocabulary

DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# name: (what the file says, the name in llama.cpp)
KINDS = {
    "llama 3": (dict(pre_tokenizer=sequence(split(LLAMA3), BYTES_ONLY), ignore_merges=True), "llama-bpe"),
    "phi 4": (dict(pre_tokenizer=sequence(split(LLAMA3), BYTES_ONLY)), "dbrx"),
    "qwen 2": (dict(pre_tokenizer=sequence(split(QWEN2), BYTES_ONLY), normalizer=NFC), "qwen2"),
    "gpt 2": (dict(pre_tokenizer=GPT2), "gpt-2"),
    "olmoe": (dict(pre_tokenizer=GPT2, normalizer=NFC), "olmo"),
    "smollm": (dict(pre_tokenizer=sequence(DIGITS, GPT2)), "smollm"),
}


@functools.cache
def trained(kind):
    document = train_byte_level(specials=CHAT, **KINDS[kind][0])
    if kind == "olmoe":  # gpt-neox: runs of spaces that were added, matched before anything else
        first = len(document["model"]["vocab"])
        runs = [" " * count for count in range(24, 1, -1)]
        document["added_tokens"] += [
            added_token(first + place, run, special=False, normalized=True) for place, run in enumerate(runs)
        ]
    return document


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def original_of(document, **options):
    """ids of a text by the tokenizers library, normalized first: llama.cpp does not, which is warned of."""
    tokenizer = Tokenizer.from_str(json.dumps(document))
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def composed(document, texts):
    return (unicodedata.normalize("NFC", text) for text in texts) if document["normalizer"] else texts


def test_ids_are_those_of_the_original(kind, tmp_path):
    document = trained(kind)
    folder = write_folder(tmp_path / "a", document, tokenizer_config={"eos_token": "<|endoftext|>"})
    with stock_of(folder) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.model"] == "gpt2"
        assert vocabulary.metadata["tokenizer.ggml.pre"] == KINDS[kind][1]
        texts = list(composed(document, odd_texts(CHAT)))
        assert_same_ids(stock, original_of(document), texts)
        assert_same_ids(stock, original_of(document, encode_special_tokens=True), texts, parse_special=False)


@needs_data
def test_ids_on_books(kind, tmp_path):
    document = trained(kind)
    with stock_of(write_folder(tmp_path / "a", document)) as (_, stock):
        assert_same_ids(stock, original_of(document), composed(document, book_texts()))


def revealing(pre_tokenizer, ignore_merges):
    """Every two bytes are a token, so that ids show where text was cut, between any two characters."""
    letters = byte_letters()
    pairs = [(a, b) for a in letters for b in letters]
    tokens = letters + [a + b for a, b in pairs]
    document = untrained(pre_tokenizer)
    model = {
        "vocab": {text: token for token, text in enumerate(tokens)},
        "merges": pairs,
        "ignore_merges": ignore_merges,
    }
    document["model"] |= model
    return document


def definition_of(known):
    """A pre-tokenizer as in tokenizer.json."""
    made = {
        "Split": split,
        "Digits": lambda value: {"type": "Digits", "individual_digits": value == "individual"},
        "ByteLevel": lambda value: {**BYTES_ONLY, "use_regex": value == "regex"},
    }
    return sequence(*(made[kind](value) for kind, value in known.steps))


def characters():
    """Unicode 3.2, of ideographs and high planes some: newer ones depend on the age of both regex engines."""
    for code in [
        *range(1, 0x800),
        *range(0x800, 0x3400, 3),
        *range(0x3400, 0xFB00, 197),
        *range(0xFB00, 0x110000, 13),
    ]:
        if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Co", "Cs"):
            yield chr(code)


EXACT = {known.steps: known for known in reversed(known_pretokenizers()) if not known.differs}


@pytest.mark.parametrize("known", EXACT.values(), ids=[known.name for known in EXACT.values()])
def test_every_character_is_cut_as_by_the_original(known, tmp_path):
    document = revealing(definition_of(known), known.ignore_merges)
    around = (f"a{c}b {c} 1{c}2 !{c}? {c}{c}\n{c} x'{c}" for c in characters())
    texts = ("".join(part) for part in zip(*[around] * 8))
    with stock_of(write_folder(tmp_path / "a", document)) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.pre"] == known.name
        assert_same_ids(stock, original_of(document), texts)


DIFFERENT = [known for known in known_pretokenizers() if known.differs]


@pytest.mark.parametrize("known", DIFFERENT, ids=[known.name for known in DIFFERENT])
def test_where_llama_cpp_differs_a_warning_says_so(known, tmp_path):
    document = train_byte_level(definition_of(known), size=1000, ignore_merges=known.ignore_merges)
    with stock_of(write_folder(tmp_path / "a", document)) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.pre"] == known.name
        assert any(known.differs in warning for warning in vocabulary.warnings)
        texts = [
            "Plain words, and HelloWorld's code_1 = x[0];\n\n  if (a != b) {\n\t}",
            "naïve café 你好 привет",
        ]
        assert_same_ids(stock, original_of(document), texts)


def test_accented_capitals_are_where_tekken_differs(tmp_path):
    """If this fails, llama.cpp has become exact: the warning can go."""
    known = next(known for known in known_pretokenizers() if known.name == "tekken")
    document = revealing(definition_of(known), known.ignore_merges)
    with stock_of(write_folder(tmp_path / "a", document)) as (_, stock):
        assert stock.ids("aÉCOLE") != original_of(document)("aÉCOLE")


@pytest.mark.parametrize("kind", [kind for kind, (options, _) in KINDS.items() if "normalizer" in options])
def test_edgeinfer_composes_accents_as_the_original_does(kind, tmp_path):
    """Stock llama.cpp has no such step: it is asked, so that this says when it gets one."""
    document = trained(kind)
    folder = write_folder(tmp_path / "a", document)
    texts = [*odd_texts(CHAT), "Cafe\u0301 co\u0302te\u0301, sa\u0308gen <|im_start|>e\u0301<|im_end|>"]
    texts += [unicodedata.normalize("NFD", text) for text in texts]
    original = original_of(document)
    with stock_of(folder) as (_, stock):
        assert any(stock.ids(text) != original(text) for text in texts)
    mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    with LlamaModel(folder / "vocabulary.gguf", load_mode=mode, use_extra_bufts=False, vocab_only=True) as model:
        for text in texts:
            assert model.tokenize(text, add_special=False, parse_special=True) == original(text), repr(text)


def test_decomposed_accents_are_warned_of(tmp_path):
    vocabulary = read_vocabulary(write_folder(tmp_path / "a", trained("qwen 2")), {})
    assert any("NFC" in warning for warning in vocabulary.warnings)
    assert not any(
        "NFC" in w for w in read_vocabulary(write_folder(tmp_path / "b", trained("gpt 2")), {}).warnings
    )


def test_merges_may_be_pairs_or_strings(tmp_path):
    document = trained("gpt 2")
    pairs = [
        list(merge) if not isinstance(merge, str) else merge.split(" ")
        for merge in document["model"]["merges"]
    ]
    strings = [" ".join(pair) for pair in pairs]
    made = [
        read_vocabulary(
            write_folder(tmp_path / name, document | {"model": document["model"] | {"merges": merges}}), {}
        )
        for name, merges in [("pairs", pairs), ("strings", strings)]
    ]
    assert made[0] == made[1]
    assert made[0].metadata["tokenizer.ggml.merges"] == strings


def test_a_repeated_merge_counts_where_it_is_last(tmp_path):
    document = trained("gpt 2")
    merges = document["model"]["merges"]
    document = document | {"model": document["model"] | {"merges": merges + merges[:3]}}
    with stock_of(write_folder(tmp_path / "a", document)) as (_, stock):
        assert_same_ids(stock, original_of(document), odd_texts())


def test_ignore_merges_does_not_matter_where_merging_reaches_all(tmp_path):
    document = trained("qwen 2")
    document = document | {"model": document["model"] | {"ignore_merges": True}}
    with stock_of(write_folder(tmp_path / "a", document)) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.pre"] == "qwen2"
        assert_same_ids(stock, original_of(document), composed(document, odd_texts()))


def test_ignore_merges_that_matters_is_refused(tmp_path):
    document = trained("qwen 2")
    model = document["model"] | {"ignore_merges": True, "merges": document["model"]["merges"][:-1]}
    folder = write_folder(tmp_path / "a", document | {"model": model})
    with pytest.raises(ExportError, match="'qwen2' cuts text like this.*ignore_merges is True"):
        read_vocabulary(folder, {})


def test_bytes_alone_are_a_vocabulary(tmp_path):
    document = train_byte_level(GPT2, size=257)
    assert document["model"]["merges"] == []
    with stock_of(write_folder(tmp_path / "a", document)) as (_, stock):
        assert_same_ids(stock, original_of(document), odd_texts(["<|endoftext|>"]))


def test_pieces_are_the_text(tmp_path):
    with stock_of(write_folder(tmp_path / "a", trained("llama 3"))) as (_, stock):
        text = "Überall  gibt's\n\t<|im_start|>12345 👍🏽"
        assert b"".join(map(stock.piece, stock.ids(text))) == text.encode()


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("by", ["class", "model type"])
def test_vocab_json_with_merges_txt(name, by, tmp_path):
    from transformers import AutoTokenizer

    document = trained("gpt 2" if name == "GPT2Tokenizer" else "qwen 2")
    config = {"model_type": "gpt2" if name == "GPT2Tokenizer" else "qwen2"}
    settings = {"eos_token": "<|endoftext|>"} | ({"tokenizer_class": name} if by == "class" else {})
    settings["added_tokens_decoder"] = {str(t["id"]): t for t in document["added_tokens"]}
    folder = write_folder(
        tmp_path / "a", vocab=document["model"]["vocab"], tokenizer_config=settings, config=config
    )
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    original = AutoTokenizer.from_pretrained(folder)
    with stock_of(folder, config) as (vocabulary, stock):
        assert vocabulary.metadata["tokenizer.ggml.eos_token_id"] == original.eos_token_id
        texts = [unicodedata.normalize("NFC", text) for text in odd_texts(CHAT)]
        assert_same_ids(stock, lambda text: original.encode(text, add_special_tokens=False), texts)


def test_files_that_do_not_say_how_text_is_cut(tmp_path):
    document = trained("gpt 2")
    folder = write_folder(
        tmp_path / "a", vocab=document["model"]["vocab"], tokenizer_config={"tokenizer_class": "Odd"}
    )
    (folder / "merges.txt").write_text("", encoding="utf-8")
    with pytest.raises(
        ExportError,
        match="the tokenizer class is Odd; expected one of GPT2Tokenizer.*tokenizer.json would tell",
    ):
        read_vocabulary(folder, {})


def test_an_unknown_pre_tokenizer_is_named_with_those_that_are_known(tmp_path):
    document = trained("gpt 2") | {"pre_tokenizer": sequence(split(r"\p{L}{2}|\s"), BYTES_ONLY)}
    with pytest.raises(ExportError) as error:
        read_vocabulary(write_folder(tmp_path / "a", document), {})
    assert r"Split: \p{L}{2}|\s" in str(error.value)
    assert "llama-bpe, dbrx, qwen2, gpt-2" in str(error.value)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"pre_tokenizer": GPT2 | {"add_prefix_space": True}}, "ByteLevel adds a space before the text"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase changes text"),
        (
            {"pre_tokenizer": sequence(split(LLAMA3) | {"behavior": "MergedWithNext"}, BYTES_ONLY)},
            "MergedWithNext",
        ),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(part, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_vocabulary(write_folder(tmp_path / "a", trained("gpt 2") | part), {})
