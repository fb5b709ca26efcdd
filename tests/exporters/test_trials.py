"""The choices that `--quant auto` tries as files, and which of them it takes."""

from dataclasses import replace

import numpy as np
import pytest
from stories import ROOT
from tiny import tiny_model

from edgeinfer.exporters import trials as trials_module
from edgeinfer.exporters.auto_bits import Choice, measure
from edgeinfer.exporters.importance import gather_importance
from edgeinfer.exporters.perplexity import LossDifference, Perplexity, perplexity
from edgeinfer.exporters.quantize import quantize_gguf
from edgeinfer.exporters.trials import Trial, Trials, best_trial
from edgeinfer.modelfile import read_model_file

PAGE = (ROOT / "exporters" / "texts" / "page.txt").read_text()
CONTEXT = 64


def trial(divergence, mean, error):
    return Trial(Choice({}, "Q8_0", divergence, 0), LossDifference(mean, error))


def test_a_measured_loss_counts_where_it_is_sure():
    sure = [trial(0.010, 0.012, 1e-5), trial(0.011, 0.004, 1e-5), trial(0.020, 0.006, 1e-5)]
    assert best_trial(sure) is sure[1]


def test_chance_is_not_taken_for_a_gain():
    """Where the measured losses differ from the predictions by no more than their errors, these decide."""
    noisy = [trial(0.010, 0.012, 0.01), trial(0.011, 0.004, 0.01), trial(0.020, 0.006, 0.01)]
    assert best_trial(noisy) is noisy[0]


def test_what_all_choices_share_says_nothing_about_which_is_best():
    """A divergence may be predicted too large by far (experts that change), for all of them alike."""
    shared = [trial(0.030, 0.0021, 0.002), trial(0.031, 0.0023, 0.002), trial(0.032, 0.0019, 0.002)]
    assert best_trial(shared) is shared[0]


def test_the_stock_type_wins_where_measured_losses_can_be_trusted():
    stock = trial(0.020, 0.003, 1e-4), trial(0.020, 0.003, 0.01)
    near = [trial(0.010, 0.012, 1e-4), trial(0.011, 0.008, 1e-4), trial(0.012, 0.013, 1e-4)]
    sure, unsure = replace(stock[0], stock="Q4_K_M"), replace(stock[1], stock="Q4_K_M")
    assert best_trial([*near, sure]) is sure
    noisy = [replace(t, loss=LossDifference(t.loss.mean, 0.01)) for t in near]
    assert best_trial([*noisy, unsure]) is noisy[0]


def test_differences_are_of_the_same_tokens():
    rng = np.random.default_rng(0)
    losses = rng.exponential(2.0, 500)
    steps = rng.normal(0.01, 0.02, 500)
    found = Perplexity.of(losses + steps).difference(Perplexity.of(losses))
    assert found.mean == pytest.approx(steps.mean())
    assert found.error == pytest.approx(steps.std(ddof=1) / np.sqrt(500))


def test_no_more_windows_than_asked_for(tmp_path):
    model = tiny_model(tmp_path, "llama", "F32", layers=1)
    every = perplexity(model, PAGE, context=CONTEXT, threads=1)
    some = perplexity(model, PAGE, context=CONTEXT, most_windows=3, threads=1)
    scored = CONTEXT - CONTEXT // 2 - 1
    assert every.tokens > 3 * scored and 2 * scored <= some.tokens <= 3 * scored
    assert some.losses[:scored] == pytest.approx(every.losses[:scored])
    assert perplexity(model, PAGE, context=CONTEXT, most_windows=10**6, threads=1).tokens == every.tokens


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """(the model, its importance matrix, Trials, bytes of its Q4_K_M file)"""
    monkeypatch.setattr(trials_module, "_MOST_CHOICES", 3)
    monkeypatch.setattr(trials_module, "_LEAST_CHOICES", 3)
    model = tmp_path / "float.gguf"
    quantize_gguf(ROOT / "models" / "story.gguf", model, "F32", requantize=True)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)
    stock = quantize_gguf(model, tmp_path / "stock.gguf", "Q4_K_M", importance=importance, threads=1)
    chooser = measure(model, PAGE, importance, num_bytes=stock.target_bytes, context=CONTEXT, threads=1)
    folder = tmp_path / "work"
    folder.mkdir()
    trials = Trials(model, PAGE, importance, chooser, folder, context=CONTEXT, threads=1)
    return model, importance, trials, stock.target_bytes, folder


def test_near_choices_and_the_stock_type_of_the_size_are_tried(chosen, tmp_path):
    model, _importance, trials, num_bytes, folder = chosen
    shares = []
    found = trials.run(num_bytes, shares.append)
    assert [trial.stock for trial in found] == [None] * (len(found) - 1) + ["Q4_K_M"]
    assert len(found) >= 4 and shares[-1] == 1 and sorted(shares) == shares
    assert list(folder.iterdir()) == []
    assert found[0].choice.divergence == min(trial.choice.divergence for trial in found)
    assert all(trial.choice.divergence < 1.5 * found[0].choice.divergence for trial in found[:-1])
    assert len({tuple(trial.choice.types.items()) for trial in found}) == len(found)
    # the stock file is the one that `--quant Q4_K_M` writes, and the losses are those of real files
    types = {tensor.name: tensor.type for tensor in read_model_file(tmp_path / "stock.gguf").tensors}
    assert found[-1].choice.types.items() <= types.items()
    scores = [perplexity(path, PAGE, context=CONTEXT, threads=1) for path in (tmp_path / "stock.gguf", model)]
    assert found[-1].loss.mean == pytest.approx(scores[0].losses.mean() - scores[1].losses.mean(), abs=1e-6)


def test_a_stock_type_that_is_too_large_is_not_tried(chosen):
    *_others, trials, num_bytes, _folder = chosen
    found = trials.run(num_bytes - 2000)
    assert found[-1].stock != "Q4_K_M"
    assert all(trial.choice.num_bytes <= num_bytes for trial in found)
