"""Reading experts ahead switches itself off, and on again, by what tokens really take."""

import random

import pytest

from edgeinfer.experts.trial import BLOCK_TOKENS, BLOCKS, FIRST_TOKENS, HOLD_TOKENS, PredictionTrial

TRIAL = len(BLOCKS) * BLOCK_TOKENS


def decode(trial, tokens, seconds_with, seconds_without, noise=0.0, seed=1):
    """What `predicting` said before each of so many tokens."""
    source = random.Random(seed)
    said = []
    for _ in range(tokens):
        said.append(trial.predicting)
        trial.record((seconds_with if said[-1] else seconds_without) * (1 + noise * source.random()))
    return said


def test_both_ways_are_tried_equally_often():
    said = decode(PredictionTrial(), FIRST_TOKENS + TRIAL, 1.0, 1.0)
    assert all(said[:FIRST_TOKENS])
    assert sum(said[FIRST_TOKENS:]) == TRIAL // 2


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(("seconds_with", "pays"), [(0.8, True), (1.0, False), (1.2, False)])
def test_the_better_way_is_kept(seconds_with, pays, noise):
    trial = PredictionTrial()
    decode(trial, FIRST_TOKENS + TRIAL, seconds_with, 1.0, noise if seconds_with != 1.0 else 0.0)
    assert decode(trial, HOLD_TOKENS, 1.0, 1.0) == [pays] * HOLD_TOKENS


def test_a_few_tokens_that_something_else_held_up_do_not_decide():
    trial = PredictionTrial()
    decode(trial, FIRST_TOKENS, 0.8, 1.0)
    for number in range(TRIAL):
        held_up = number in (1, 13, 17)  # of the blocks with reading ahead
        trial.record(50.0 if held_up else 0.8 if trial.predicting else 1.0)
    assert trial.predicting


def test_it_is_tried_again():
    trial = PredictionTrial()
    decode(trial, FIRST_TOKENS + TRIAL, 1.2, 1.0)
    decode(trial, HOLD_TOKENS, 1.2, 1.0)
    decode(trial, TRIAL, 0.7, 1.0)
    assert trial.predicting
