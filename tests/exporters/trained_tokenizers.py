"""Tokenizers trained here by the libraries that people train them with, and stock llama.cpp to compare with.

No hub is needed: a small vocabulary shows the same differences as a large one.
"""

import ctypes
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import gguf
import llama_cpp
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from edgeinfer.exporters.vocabulary import read_vocabulary

ROOT = Path(__file__).resolve().parents[2]
DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="EDGEINFER_TEST_DATA (texts, reference vocabularies) is not set"
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES_ONLY, "use_regex": True}
SPACE = "\u2581"

MANY_LANGUAGES = [
    "Привет, мир! Это проверка 2024 года.",
    "שלום עולם, אני כאן",
    "你好世界，今天天气很好。東京タワー",
    "नमस्ते दुनिया, यह हिन्दी है",
    "مرحبا بالعالم كيف الحال ١٢٣٤",
    "Ünïcödé ÉCOLE étude naïve Straße",
    "e\u0301cole nai\u0308ve a\u0300\u0301b",
    "    x = 1\n\n\n        y  =  2\t\t\n",
    "don't DON'T we'll WE'LL I'm i'M he'd they've 1234567 12 345",
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽",
]


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def training_text():
    """English and Python from this project, and some of other languages."""
    files = [
        ROOT / "README.md",
        *sorted((ROOT / "edgeinfer").glob("*.py")),
        *sorted((ROOT / "exporters").glob("*.py")),
    ]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return lines[:6000] + MANY_LANGUAGES * 20


def untrained(pre_tokenizer, normalizer=None):
    """A tokenizer.json of a BPE without tokens."""
    document = json.loads(Tokenizer(models.BPE()).to_str())
    return document | {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}


def train_byte_level(
    pre_tokenizer, specials=("<|endoftext|>",), size=3000, ignore_merges=False, normalizer=None
):
    """A tokenizer.json of a byte-level BPE, as the tokenizers library writes it."""
    tokenizer = Tokenizer.from_str(json.dumps(untrained(pre_tokenizer, normalizer)))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = ignore_merges
    return document


def train_sentencepiece(**options):
    """The bytes of a tokenizer.model set up as llama's, unless `options` say otherwise."""
    settings = dict(
        model_type="bpe",
        vocab_size=2500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.999,
        num_threads=1,
        minloglevel=2,
    )
    model = io.BytesIO()
    lines = [line for line in training_text() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **(settings | options)
    )
    return model.getvalue()


GEMMA = dict(
    add_dummy_prefix=False,
    pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    user_defined_symbols=[
        "<start_of_turn>", "<end_of_turn>", "<table>",
        *("\n" * count for count in range(1, 31)),
        *(SPACE * count for count in range(2, 32)),
    ],
)  # fmt: skip


def parse_model(model):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def as_tokenizer_json(model, normalizer, pre_tokenizer=None):
    """As transformers makes it from a tokenizer.model: merges come from the pieces' scores."""
    pieces = parse_model(model).pieces
    vocabulary = {piece.piece: token for token, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in pieces})
    added = [
        added_token(token, piece.piece, special=piece.type != piece.USER_DEFINED)
        for token, piece in enumerate(pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
    ]
    unknown = next(piece.piece for piece in pieces if piece.type == piece.UNKNOWN)
    document = untrained(pre_tokenizer, normalizer)
    document["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    document["model"] |= {"vocab": vocabulary, "merges": [list(merge) for merge in merges]}
    return document | {"added_tokens": added}


def added_token(token, content, special=True, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, "special": special, **plain, **flags}


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACES_WITH_ONE_BEFORE = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, SPACES]}


def write_folder(folder, tokenizer=None, model=None, **documents):
    """A checkpoint folder with tokenizer.json, tokenizer.model and further `name=content` as name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    for name, document in {"tokenizer": tokenizer, **documents}.items():
        if document is not None:
            (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def write_gguf(vocabulary, path, name="tokens"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(vocabulary.name_for(name))
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class Stock:
    """Stock llama.cpp's tokenizer on a GGUF with a vocabulary and no weights."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp cannot load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)

    def ids(self, text, parse_special=True, add_special=False):
        data = text.encode("utf-8")
        size = len(data) + 8
        tokens = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), tokens, size, add_special, parse_special
        )
        assert count >= 0
        return tokens[:count]

    def piece(self, token):
        buffer = ctypes.create_string_buffer(2048)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 2048, 0, True)
        return buffer.raw[:count]

    def close(self):
        llama_cpp.llama_model_free(self._model)


@contextmanager
def stock_of(folder, config=None, name="tokens"):
    """(vocabulary, stock llama.cpp on the GGUF made of it) of a checkpoint folder."""
    vocabulary = read_vocabulary(folder, config or {})
    stock = Stock(write_gguf(vocabulary, folder / "vocabulary.gguf", name))
    try:
        yield vocabulary, stock
    finally:
        stock.close()


def odd_texts(specials=()):
    """Control characters, emoji, right to left, marks, spaces, numbers, code, bad UTF-8, special tokens."""
    yield from MANY_LANGUAGES
    yield "".join(map(chr, range(1, 32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA1)))
    yield "a\x00b\x00\x00 c"
    yield "👩🏾‍🚀👨‍❤️‍💋‍👨 1️⃣ ☝🏿 🇺🇸🇺 \U0001f9ff\ufe0f\u200d"
    yield "\u202eright to left\u202c \u200f\u061cשׁ\u05b8לוֹם ﷺ لا\u200dإله"
    yield "Z\u0351\u036b\u0343a\u0328\u0301l\u0301g\u0306o\u0334 \u1100\u1161\u11a8 각 \u0e19\u0e49\u0e33"
    yield "㈱ﬁﬂＡＢＣ１２３ℌ①½²³ Ⅷ ٠١٢٣ ๑๒๓ 三百"
    yield "\u00a0\u2003\u3000\u2028\u2029\u200b\ufeff\u0085x\u1680y"
    yield "def f(x):\n\treturn {'a': x[0]**2, \"b\": x != y}  # comment\r\n\r\n    pass\n"
    yield "3.14159 1,234,567 0xDEADBEEF 1e-10 192.168.0.1 ２０２４年"
    yield b"caf\xe9 \xff\xfe\xc3\x28\xa0\xa1\xe2\x82 \xf0\x9f\x98 end\xed\xa0\x80".decode("utf-8", "replace")
    for count in (1, 2, 3, 5, 8, 17, 31, 32, 33, 65):
        for run in (" ", "\n", "\t", "=", "-", "a", "  \n"):
            yield run * count
            yield f"x{run * count}y"
    for special in specials:
        yield special
        yield f"a{special}b"
        yield f" {special} {special}\n{special}{special} c"
    yield ""
    yield "".join(specials)


def book_texts():
    """The first 200,000 characters of each text of the test data, and of a book."""
    folder = Path(DATA) / "text"
    for path in [*sorted(folder.glob("*.txt")), next(iter(sorted((folder / "books").iterdir())))]:
        yield path.read_text(encoding="utf-8", errors="replace")[:200_000]


def assert_same_ids(stock, original, texts, parse_special=True):
    """`original(text)` gives the ids that are right."""
    for text in texts:
        expected, found = list(original(text)), stock.ids(text, parse_special)
        if expected != found:
            place = next(
                (i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found))
            )
            raise AssertionError(
                f"{text[:200]!r}: at {place} expected {expected[place:][:8]}, found {found[place:][:8]}"
            )
