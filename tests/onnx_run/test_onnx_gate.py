"""A gate in samples: hysteresis, hold and lead, against a plain per-sample reading of the rules."""

import numpy as np
import pytest

from edgeinfer.forms import GateRule
from edgeinfer.streams.gate import Gate


def expected(values, size, rule, hold, lead):
    """Open or shut, sample by sample."""
    asked = np.zeros(len(values) * size, bool)
    asking = False
    for step, value in enumerate(values):
        asking = value is not None and (value >= rule.above or (asking and value >= rule.release))
        asked[step * size : (step + 1) * size] = asking
    left_out = np.repeat([value is None for value in values], size)
    is_open = np.zeros_like(asked)
    for sample in np.flatnonzero(asked):
        is_open[max(0, sample - lead) : sample + 1] = True
        is_open[sample : sample + hold + 1] |= ~left_out[sample : sample + hold + 1]
    return is_open


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_rules_sample_by_sample(seed):
    random = np.random.default_rng(seed)
    values = list(random.random(40))
    rule = GateRule("output", "speech", above=0.8, below=0.6 if seed % 2 else None)
    hold, lead, size = int(random.integers(0, 30)), int(random.integers(0, 30)), 8
    gate, found = Gate(rule, hold, lead), []
    for value in values:
        gate.decide(size, value)
        found += gate.take()
    found += gate.take(finish=True)
    samples = np.concatenate([np.full(count, is_open) for count, is_open in found])
    np.testing.assert_array_equal(samples, expected(values, size, rule, hold, lead))
    assert gate.samples == len(samples) and gate.open_samples == samples.sum()


def test_no_decision_is_taken_back():
    gate = Gate(GateRule("output", "speech", above=0.5), lead=10)
    gate.decide(30, 0.0)
    assert gate.take() == [(20, False)]  # the last 10 may still be opened
    gate.decide(5, 0.9)
    assert gate.take(finish=True) == [(15, True)]


def test_what_was_left_out_is_shut():
    gate = Gate(GateRule("output", "speech"), hold=100)
    gate.decide(10, 0.9)
    gate.decide(20, None)
    gate.decide(10, 0.1)
    assert gate.take(finish=True) == [(10, True), (20, False), (10, True)]
