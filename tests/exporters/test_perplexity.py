"""Perplexity as llama.cpp's tool defines it, against stock llama.cpp's logits and PyTorch's by hand."""

import llama_cpp
import numpy as np
import pytest
from stories import ROOT
from tiny import tiny_model

from edgeinfer.errors import BudgetError, ExportError, ModelFileError
from edgeinfer.exporters import windows as windows_module
from edgeinfer.exporters.perplexity import negative_log_probability, perplexity
from edgeinfer.exporters.windows import read_text
from edgeinfer.models import default_model_path

STORY = default_model_path()
TEXT = (ROOT / "exporters" / "texts" / "page.txt").read_text()
CONTEXT = 128


def by_hand(llama, tokens, context):
    """Losses of the second half of each window, from stock llama.cpp's logits in float64."""
    losses = []
    for start in range(0, len(tokens) - context + 1, context):
        window = [llama.token_bos(), *tokens[start + 1 : start + context]]
        llama.reset()
        llama.eval(window)
        logits = llama.scores[:context].astype(np.float64)
        logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logs -= logits.max(1, keepdims=True)
        losses += [-logs[i, window[i + 1]] for i in range(context // 2, context - 1)]
    return np.array(losses)


@pytest.fixture
def stock(monkeypatch):
    """Stock llama.cpp with the flash attention that its tools choose, and plain kernels."""
    bindings = llama_cpp.llama_cpp
    stock_params = bindings.llama_model_default_params

    def plain_params():
        params = stock_params()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(bindings, "llama_model_default_params", plain_params)
    options = {
        "n_batch": CONTEXT,
        "n_threads": 1,
        "n_threads_batch": 1,
        "logits_all": True,
        "flash_attn": True,
    }
    llama = llama_cpp.Llama(str(STORY), n_ctx=CONTEXT, verbose=False, **options)
    yield llama
    llama.close()


def test_equals_stock_llama_cpp_by_hand(stock):
    expected = by_hand(stock, stock.tokenize(TEXT.encode()), CONTEXT)
    found = perplexity(STORY, TEXT, context=CONTEXT, threads=1)
    assert found.tokens == len(expected) == len(found.losses) > 200
    np.testing.assert_allclose(found.losses, expected, atol=1e-5)
    assert found.value == pytest.approx(np.exp(expected.mean()), rel=1e-6)
    error = np.exp(expected.mean()) * expected.std(ddof=1) / np.sqrt(len(expected))
    assert found.error == pytest.approx(error, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary(tmp_path):
    """Logits of a random model are small against those of a trained one."""
    found = perplexity(tiny_model(tmp_path, "llama", "F32"), TEXT, context=64, threads=1)
    assert 512 * 0.9 < found.value < 512 * 2.5


def test_the_loss_of_known_probabilities():
    logits = np.log(np.array([0.1, 0.2, 0.7], np.float32)) + 50
    assert negative_log_probability(logits, 2) == pytest.approx(-np.log(0.7), rel=1e-5)
    assert negative_log_probability(np.array([0.0, 5000.0], np.float32), 0) == 5000.0


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_memory_changes_nothing(tmp_path, monkeypatch, arch):
    """The smallest budget that works streams the weights; the numbers stay."""
    model = tiny_model(tmp_path, arch, "F16", layers=3, ffn=1024)
    text = TEXT[:500]
    plain = perplexity(model, text, context=64, threads=1)
    with pytest.raises(BudgetError) as refused:
        perplexity(model, text, context=64, threads=1, memory=1 << 20)
    monkeypatch.setattr(windows_module, "_plain", None)  # for what fits
    memory = refused.value.smallest_bytes + (1 << 20)
    streamed = perplexity(model, text, context=64, threads=1, memory=memory)
    if arch == "llama":
        np.testing.assert_allclose(streamed.losses, plain.losses, rtol=1e-6)
    else:  # fewer tokens at once, where the cache of experts is small: other kernels, a tie that falls otherwise
        assert streamed.losses.mean() == pytest.approx(plain.losses.mean(), rel=5e-3)


def test_the_end_of_the_text_and_long_windows():
    """A rest that fills no window is dropped; windows are no longer than what the model was trained for."""
    seen = []
    one = perplexity(STORY, TEXT, context=4096, threads=1, progress=seen.append)
    assert one.tokens == 255 and seen == sorted(seen) and 0.9 < seen[-1] <= 1


@pytest.mark.parametrize(
    "text, context, words",
    [
        (
            "Once upon a time",
            512,
            r"The text for perplexity is too short: it has \d tokens, expected 512 at least",
        ),
        ("", 64, "too short: it has 1 tokens, expected 64"),
        (TEXT, 4, "A window of 4 tokens is too short. Expected 8"),
    ],
)
def test_what_cannot_be_scored(text, context, words):
    with pytest.raises(ExportError, match=words):
        perplexity(STORY, text, context=context, threads=1)


def test_models_that_predict_nothing_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="there is no such file"):
        perplexity(tmp_path / "none.gguf", TEXT)


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ExportError, match="is not UTF-8: byte 3 is 0xe9"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read_text(tmp_path / "none.txt")
