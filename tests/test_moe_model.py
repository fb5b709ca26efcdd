"""The small mixture of experts in stock llama.cpp: size, words, loss and routing on unseen stories."""

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from stories import ROOT, assert_writes_words, held_out_losses, held_out_tokens, needs_texts, stock_llama
from test_maker import ChosenExperts, Stock

MODEL = ROOT / "models" / "story-moe.gguf"
LAYERS, EXPERTS, USED = 8, 16, 2
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

# Nats a token on every fourth held-out story; measured: 2.549 (on all of them: 2.517).
LARGEST_HELD_OUT_LOSS = 2.6


@pytest.fixture(scope="module")
def reader():
    return GGUFReader(MODEL)


@pytest.fixture(scope="module")
def stock():
    with stock_llama(MODEL) as llama:
        yield llama


@pytest.fixture(scope="module")
def expert_use(stock):
    """Float [layers, experts]: the share of held-out tokens that llama.cpp's router gives to each expert."""
    chosen = ChosenExperts(EXPERTS, USED)
    counts, num_tokens = np.zeros((LAYERS, EXPERTS)), 0
    with Stock(MODEL, on_node=chosen) as model:
        for tokens in held_out_tokens(stock):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.context), True)
            chosen.num_tokens = len(tokens)
            model.logits(tokens)
            counts += [chosen.counts[f"ffn_moe_topk-{layer}"] for layer in range(LAYERS)]
            num_tokens += len(tokens)
    assert (counts.sum(axis=1) == USED * num_tokens).all()
    return counts / num_tokens


def test_the_file_is_at_most_12_mb_and_every_layer_has_16_experts(reader):
    assert MODEL.stat().st_size <= 12_000_000
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == LAYERS
    assert (fields["llama.expert_count"], fields["llama.expert_used_count"]) == (EXPERTS, USED)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in range(LAYERS):
        for role in EXPERT_ROLES:
            tensor = tensors[f"blk.{layer}.{role}.weight"]
            assert tensor.tensor_type == GGMLQuantizationType.Q8_0 and tensor.shape[2] == EXPERTS
        assert tensors[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type == GGMLQuantizationType.F32


def test_no_two_experts_are_equal(reader):
    for tensor in reader.tensors:
        if tensor.name.split(".")[-2] in EXPERT_ROLES:
            assert len({expert.tobytes() for expert in tensor.data}) == EXPERTS, tensor.name


def test_the_card_says_what_it_is_and_under_which_licence(reader):
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "edgeinfer-story-moe"
    assert fields["general.license"] == "CDLA-Sharing-1.0"
    card = MODEL.with_suffix(".md").read_text(encoding="utf-8")
    assert "CDLA-Sharing-1.0" in card and f"{MODEL.stat().st_size:,} bytes" in card


def test_the_tokenizer_is_the_dense_models(reader):
    dense = GGUFReader(MODEL.with_name("story.gguf"))
    names = [name for name in dense.fields if name.startswith("tokenizer.")]
    assert "tokenizer.ggml.tokens" in names
    for name in names:
        assert reader.fields[name].contents() == dense.fields[name].contents(), name


@needs_texts
@pytest.mark.parametrize("prompt", ["Once upon a time", "The little dog"])
def test_greedy_text_is_made_of_english_words(stock, prompt):
    assert_writes_words(stock, prompt, least_variety=0.15)  # the second one goes round in circles: 0.22


@needs_texts
def test_loss_on_held_out_stories(stock):
    losses = held_out_losses(stock)
    assert len(losses) > 2500
    assert losses.mean() < LARGEST_HELD_OUT_LOSS


@needs_texts
def test_every_expert_is_used(expert_use):
    assert expert_use.min() >= 0.01


@needs_texts
def test_experts_are_used_unevenly_but_no_two_do_most_of_the_work(expert_use):
    even = USED / EXPERTS
    assert (expert_use.max(axis=1) > 1.2 * even).all(), "the experts are used as evenly as by chance"
    assert (np.sort(expert_use, axis=1)[:, -2:].sum(axis=1) < 0.5 * USED).all()
