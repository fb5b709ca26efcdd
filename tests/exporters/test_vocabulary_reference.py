"""Real vocabularies (llama.cpp's references): a tokenizer.json made of each gives the ids it should."""

from itertools import islice
from pathlib import Path

import gguf
import pytest
from test_vocabulary_bpe import definition_of
from tokenizers import Tokenizer
from trained_tokenizers import (
    DATA,
    SPACES_WITH_ONE_BEFORE,
    Stock,
    added_token,
    assert_same_ids,
    book_texts,
    needs_data,
    odd_texts,
    stock_of,
    untrained,
    write_folder,
)
from transformers.tokenization_utils_base import generate_merges

from edgeinfer.exporters.pretokenizers import known_pretokenizers

pytestmark = needs_data
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
PHI3_NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def reference(name):
    return Path(DATA) / "vocab" / f"ggml-vocab-{name}.gguf"


def fields_of(name):
    reader = gguf.GGUFReader(reference(name))
    prefix = "tokenizer.ggml."
    return {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }


def tokenizer_json(name, fields):
    """What such a checkpoint has as tokenizer.json; merges of a SentencePiece model come from its scores."""
    tokens, types = fields["tokens"], fields["token_type"]
    size = max(token for token, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED, UNUSED)) + 1
    vocabulary = {text: token for token, text in enumerate(tokens[:size])}
    strips = name == "phi-3"
    added = [
        added_token(
            token, text, special=kind != USER_DEFINED, rstrip=strips and text not in PHI3_NOT_STRIPPED
        )
        for token, (text, kind) in enumerate(zip(tokens, types))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    if fields["model"] == "gpt2":
        known = next(known for known in known_pretokenizers() if known.name == fields["pre"])
        document, merges, model = untrained(definition_of(known)), fields["merges"], {}
    else:
        document = untrained(None, SPACES_WITH_ONE_BEFORE)
        scores = {tokens[token]: fields["scores"][token] for token in range(size) if types[token] == NORMAL}
        merges = [list(merge) for merge in generate_merges(vocabulary, scores)]
        model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    document["model"] |= {"vocab": vocabulary, "merges": merges, **model}
    return document | {"added_tokens": added}


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "deepseek-llm"])
def test_ids_are_those_of_the_reference(name, tmp_path):
    fields = fields_of(name)
    document = tokenizer_json(name, fields)
    settings = {f"{kind}_token": fields["tokens"][fields[f"{kind}_token_id"]] for kind in ("bos", "eos")}
    folder = write_folder(tmp_path / "a", document, tokenizer_config=settings)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def by_tokenizers(text):
        return original.encode(text, add_special_tokens=False).ids

    with stock_of(folder, {"vocab_size": len(fields["tokens"])}, name) as (vocabulary, stock):
        found = vocabulary.metadata
        assert found["tokenizer.ggml.tokens"] == fields["tokens"]
        assert found["tokenizer.ggml.pre"] == fields["pre"]
        for key in ("bos_token_id", "eos_token_id"):
            assert found[f"tokenizer.ggml.{key}"] == fields[key]
        texts = (
            reference(name)
            .with_suffix(".gguf.inp")
            .read_text(encoding="utf-8")
            .split("\n__ggml_vocab_test__\n")
        )
        lines = reference(name).with_suffix(".gguf.out").read_text().split("\n")
        answers = {
            text: [int(token) for token in line.split()] for text, line in zip(texts, lines, strict=True)
        }
        assert_same_ids(stock, answers.__getitem__, texts, parse_special=False)
        # llama.cpp's general regexes, which deepseek-llm needs, are slow
        assert_same_ids(stock, by_tokenizers, islice(book_texts(), 1 if name == "deepseek-llm" else None))
        odd = odd_texts(["<s>", "</s>", "<|end|>", "<|endoftext|>"])
        # rare spaces are what the warning about deepseek-llm is about
        assert_same_ids(
            stock, by_tokenizers, [text for text in odd if name != "deepseek-llm" or "\u3000" not in text]
        )
        upstream = Stock(reference(name))
        assert_same_ids(stock, upstream.ids, odd_texts())
        upstream.close()
