"""The embedded default model in stock llama.cpp: size, English sentences, loss on stories it has not seen."""

import pytest
from gguf import GGUFReader
from stories import ROOT, assert_writes_words, held_out_losses, needs_texts, stock_llama

MODEL = ROOT / "models" / "story.gguf"

# Nats a token on every fourth held-out story; measured: 2.564 (on all of them: 2.502).
LARGEST_HELD_OUT_LOSS = 2.6


@pytest.fixture(scope="module")
def reader():
    return GGUFReader(MODEL)


@pytest.fixture(scope="module")
def stock():
    with stock_llama(MODEL) as llama:
        yield llama


def test_the_file_is_at_most_8_mb_with_3_to_8_million_parameters(reader):
    assert MODEL.stat().st_size <= 8_000_000
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert 3_000_000 <= parameters <= 8_000_000


def test_the_file_says_what_it_is_and_under_which_licence(reader):
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "edgeinfer-story"
    assert fields["general.license"] == "CDLA-Sharing-1.0"
    assert fields["tokenizer.ggml.model"] == "llama"
    card = MODEL.with_suffix(".md").read_text(encoding="utf-8")
    assert "CDLA-Sharing-1.0" in card and f"{MODEL.stat().st_size:,} bytes" in card


def test_text_survives_tokens_and_back(stock):
    for text in ("Once upon a time", 'He said, "Hi!"\n\nThe end.', "a  b\tc", "caf\u00e9 \u706b #*~"):
        tokens = stock.tokenize(text.encode(), add_bos=False)
        assert stock.detokenize(tokens).decode() == " " + text


@needs_texts
@pytest.mark.parametrize("prompt", ["Once upon a time", "The little dog"])
def test_greedy_text_is_made_of_english_words(stock, prompt):
    assert_writes_words(stock, prompt, least_variety=0.25)


@needs_texts
def test_loss_on_held_out_stories(stock):
    losses = held_out_losses(stock)
    assert len(losses) > 2500
    assert losses.mean() < LARGEST_HELD_OUT_LOSS
