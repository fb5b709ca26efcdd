"""`--check` on language models: the numbers are right, right exports pass, wrong ones fail and the message
says how.
"""

import json
import sys

import gguf
import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from gguf_copies import changed, reordered  # noqa: E402
from tiny_checkpoints import llama_logits, plain_vocabulary, tiny_checkpoint  # noqa: E402

from edgeinfer.errors import BudgetError, ExportError  # noqa: E402
from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.check import PAGE, check  # noqa: E402
from edgeinfer.exporters.quantize import quantize_gguf  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402

F32 = gguf.GGMLQuantizationType.F32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def exported(folder, monkeypatch):
    """exported(architecture, type) -> (checkpoint folder, GGUF file), made once. The checkpoints have no
    tokenizer.
    """
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)

    def export(architecture, type="F32"):
        source, result = folder / architecture, folder / f"{architecture}-{type}.gguf"
        if not source.exists():
            tiny_checkpoint(source, architecture)
        if not result.exists():
            export_gguf(source, result, type)
        return source, result

    return export


def torch_logits(source, tokens):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def page_tokens(model):
    import llama_cpp

    llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return llama.tokenize(PAGE.read_bytes(), add_bos=True, special=True)


# ---- what is reported ------------------------------------------------------------------------------------


def test_numbers_are_those_of_pytorch_and_stock_llama(exported):
    source, result = exported("llama", "F16")
    report = check(source, result)
    tokens = page_tokens(result)[:256]  # what the model was trained for
    expected, found = torch_logits(source, tokens), llama_logits(result, tokens)
    difference = np.abs(found.astype(np.float64) - expected)
    assert report.positions == 256
    assert report.largest_difference == pytest.approx(difference.max(), rel=0.02)
    assert report.mean_difference == pytest.approx(difference.mean(), rel=0.02)
    assert report.relative_difference == pytest.approx(difference.max() / np.abs(expected).max(), rel=0.02)
    assert report.typical_difference == pytest.approx(
        np.median(difference.max(axis=1)) / np.abs(expected).max(), rel=0.02
    )
    assert report.top_agreement == pytest.approx((found.argmax(1) == expected.argmax(1)).mean(), abs=0.005)
    for logits, value in ((expected, report.source_perplexity), (found, report.result_perplexity)):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1))[:-1] - shifted[np.arange(255), tokens[1:]]
        assert value == pytest.approx(np.exp(losses.mean()), rel=1e-4)


def test_report_on_the_screen_and_as_json(exported):
    report = check(*exported("llama"))
    text = "\n".join(report.lines())
    assert "against PyTorch at 256 positions, F32" in text and text.endswith("passed")
    assert "the largest may be 1.0e-04" in text and "same top choice: 100.00%" in text
    assert "the source has no tokenizer" in text
    facts = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert facts["passed"] is True and facts["limit"] == 1e-4 and facts["failure"] is None


def test_progress_goes_from_start_to_end(exported):
    seen = []
    check(*exported("llama"), progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1) and min(seen) <= 0.5


def test_a_text_of_ones_own(exported):
    source, result = exported("llama")
    report = check(source, result, text="Hello there")
    assert report.positions == len(page_tokens_of(result, "Hello there"))
    with pytest.raises(ExportError, match="The text has 1 tokens, expected 2 at least"):
        check(source, result, text="")


def page_tokens_of(model, text):
    import llama_cpp

    return llama_cpp.Llama(str(model), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=True)


def test_the_bundled_page():
    assert 2000 < PAGE.stat().st_size < 4096 and PAGE.read_text(encoding="ascii").startswith(
        "The Mole had been"
    )


# ---- right exports pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe"])
def test_float32(exported, architecture):
    report = check(*exported(architecture))
    assert report.passed and report.precision == "F32" and report.limit == 1e-4
    assert report.relative_difference < 1e-5 and report.top_agreement == 1
    assert report.result_perplexity == pytest.approx(report.source_perplexity, rel=1e-4)


@pytest.mark.parametrize(("type", "roundoff"), [("F16", 2**-11), ("BF16", 2**-8)])
def test_rounded_weights(exported, type, roundoff):
    """What rounding does is predicted from PyTorch, and within a factor of two of what llama.cpp does."""
    report = check(*exported("llama", type))
    assert report.passed and report.precision == type and report.judged == "largest"
    assert 0.5 < report.relative_difference / report.expected_difference < 2
    assert report.limit == pytest.approx(4 * report.expected_difference) and report.limit < 32 * roundoff


def test_gelu_from_a_table(exported):
    """llama.cpp rounds gelu to float16, more than 1e-4 even where all weights are float32."""
    report = check(*exported("gemma2"))
    assert report.passed and report.relative_difference > 1e-4
    assert report.relative_difference == pytest.approx(report.expected_difference, rel=0.2)


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_mixtures_of_experts_are_judged_by_the_median(exported, type):
    """Rounding may choose another expert, which is no fault of the export."""
    report = check(*exported("qwen3moe", type))
    assert report.passed and report.judged == "typical"
    assert 0.3 < report.typical_difference / report.expected_difference < 3


# ---- wrong ones fail -------------------------------------------------------------------------------------


def test_a_sliding_window_that_llama_cpp_has_not_is_where_comparing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)
    tiny_checkpoint(tmp_path / "tiny", "mistral", sliding_window=64)
    export_gguf(tmp_path / "tiny", tmp_path / "tiny.gguf")
    report = check(tmp_path / "tiny", tmp_path / "tiny.gguf")
    assert report.passed and report.positions == 64
    assert report.notes[-1] == "up to the sliding window of 64 tokens"


def test_a_weight_that_is_off_by_a_thousandth(exported, tmp_path):
    source, result = exported("llama")
    wrong = changed(result, tmp_path / "wrong.gguf", "blk.1.ffn_down.weight", lambda values: values * 1.001)
    report = check(source, wrong)
    assert not report.passed and report.lines()[-1].startswith("  FAILED: the largest difference is")
    assert "more than the 1.0e-04 that the order of sums explains (256 of 256 positions" in report.failure


@pytest.mark.parametrize("type", ["F16", "BF16"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "blk.1.attn_q.weight",
            lambda values: values.reshape(4, 8, 2, -1).swapaxes(1, 2).reshape(values.shape),
        ),
        ("blk.0.ffn_gate.weight", lambda values: values[::-1]),
        ("blk.1.attn_norm.weight", lambda values: values + 1),
        ("output.weight", lambda values: np.concatenate([values[:-1], -values[-1:]])),
    ],
    ids=["heads that are not permuted", "rows in reverse", "norms with one added", "one row of the output"],
)
def test_rounded_weights_that_are_wrong(exported, tmp_path, type, name, change):
    source, result = exported("llama", type)
    report = check(source, changed(result, tmp_path / "wrong.gguf", name, change))
    assert not report.passed and f"that rounding to {type} explains" in report.failure


def test_experts_whose_weights_are_off_by_a_fifth(exported, tmp_path):
    source, result = exported("qwen3moe", "BF16")
    name = "blk.1.ffn_down_exps.weight"
    wrong = changed(result, tmp_path / "wrong.gguf", name, lambda values: values * 1.2)
    assert check(source, result).passed and not check(source, wrong).passed


def test_experts_in_the_wrong_order(exported, tmp_path):
    source, result = exported("qwen3moe", "BF16")

    def change(tensors):
        data, kind = tensors["blk.1.ffn_down_exps.weight"]
        return {**tensors, "blk.1.ffn_down_exps.weight": (np.ascontiguousarray(data[::-1]), kind)}

    report = check(source, reordered(result, tmp_path / "wrong.gguf", change))
    assert not report.passed and "the typical difference is" in report.failure


def test_numbers_that_are_not_finite(exported, tmp_path):
    source, result = exported("llama")
    wrong = changed(result, tmp_path / "wrong.gguf", "output_norm.weight", lambda values: values * np.nan)
    report = check(source, wrong)
    assert report.failure == "the result gives numbers that are not finite"
    json.dumps(report.as_dict(), allow_nan=False)


def test_another_vocabulary(exported, tmp_path):
    source, result = exported("llama")

    def change(tensors):
        cut = {name: (tensors[name][0][:-8], F32) for name in ("token_embd.weight", "output.weight")}
        return {**tensors, **cut}

    def shorter(name, value):
        return (
            value[:-8]
            if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
            else value
        )

    wrong = reordered(result, tmp_path / "wrong.gguf", change, shorter)
    with pytest.raises(
        ExportError, match="gives logits of 360 tokens, the result of 352: they cannot be compared"
    ):
        check(source, wrong)


# ---- GGUF against GGUF -----------------------------------------------------------------------------------


def test_a_model_against_itself(exported):
    _, result = exported("qwen3moe", "BF16")
    report = check(result, result)
    assert report.passed and report.source == "llama.cpp" and report.largest_difference == 0
    assert report.top_agreement == 1 and report.source_perplexity == report.result_perplexity
    assert report.notes[0].startswith("same ")


def test_quantized_models_are_reported_and_not_judged(exported, tmp_path):
    source, result = exported("llama")
    quantize_gguf(result, tmp_path / "small.gguf", "Q8_0")
    for reference in (source, result):
        report = check(reference, tmp_path / "small.gguf")
        assert report.passed and report.precision is None and report.limit is None
        assert report.relative_difference > 1e-3 and "quantized" in report.lines()[0]
        assert "not judged" in "\n".join(report.lines())


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_rounded_gguf_against_float32_gguf(exported, tmp_path, type):
    _, result = exported("llama")
    quantize_gguf(result, tmp_path / "half.gguf", type)
    report = check(result, tmp_path / "half.gguf")
    assert report.passed and report.limit == {"F16": 32 * 2**-11, "BF16": 32 * 2**-8}[type]
    wrong = changed(result, tmp_path / "wrong.gguf", "blk.0.ffn_gate.weight", lambda values: values[::-1])
    assert "that rounding to" in check(wrong, tmp_path / "half.gguf").failure


def test_tokenizers_that_differ(exported, tmp_path):
    _, result = exported("llama")

    def swap(name, value):
        if name == "tokenizer.ggml.tokens":
            e, t = value.index("e"), value.index("t")
            value[e], value[t] = value[t], value[e]
        return value

    other = reordered(result, tmp_path / "other.gguf", dict, swap)
    report = check(result, other)
    assert not report.passed and "the tokenizers differ: token" in report.failure


# ---- tokenizers of checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A checkpoint with a byte-level BPE tokenizer of its own, and its export."""
    import tokenizers
    import transformers
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator([PAGE.read_text()], trainer)
    tiny_checkpoint(folder / "in", "qwen2")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "in")
    export_gguf(folder / "in", folder / "out.gguf", "F32")
    return folder / "in", folder / "out.gguf"


def test_same_ids_as_the_checkpoints_tokenizer(with_tokenizer):
    report = check(*with_tokenizer)
    assert report.passed and report.notes[0].startswith("same ")


def test_other_ids_than_the_checkpoints_tokenizer(with_tokenizer, tmp_path):
    source, result = with_tokenizer

    def without_last_merges(name, value):
        return value[:-5] if name == "tokenizer.ggml.merges" else value

    report = check(source, reordered(result, tmp_path / "other.gguf", dict, without_last_merges))
    assert not report.passed and "the tokenizers differ: token" in report.failure


# ---- what cannot be compared -----------------------------------------------------------------------------


def test_too_little_memory_for_pytorch(exported):
    source, result = exported("llama")
    with pytest.raises(BudgetError, match="in float32 with PyTorch, which takes .* Raise --memory") as caught:
        check(source, result, memory=200 << 20)
    assert caught.value.smallest_bytes > 200 << 20


def test_without_the_extra(exported, monkeypatch):
    source, result = exported("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match=r'needs transformers: pip install "edgeinfer\[export\]"'):
        check(source, result)


def test_files_that_are_not_there_or_not_models(exported, tmp_path):
    source, result = exported("llama")
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        check(source, tmp_path / "nothing.gguf")
    with pytest.raises(ExportError, match="expected two GGUF or two ONNX models"):
        check(result, source / "config.json")


def test_a_checkpoint_without_a_weight(exported, tmp_path):
    from safetensors.numpy import load_file, save_file

    source, result = exported("llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ExportError, match=r"finds no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        check(tmp_path, result)
