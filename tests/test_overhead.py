"""Naming a context that fits a budget: it does fit, it is not far from the largest, and little is tried to find it."""

import pytest

from edgeinfer.engines.overhead import _largest_context

MIB, GIB = 1 << 20, 1 << 30
KV_PER_TOKEN = 3584


class Machine:
    """A model whose compute buffers grow with the context, in a process that keeps something of every trial."""

    def __init__(self, buffer_per_token, kept_bytes):
        self.buffer_per_token = buffer_per_token
        self.kept_bytes = kept_bytes
        self.tried = []

    def needs(self, tokens):
        return 70 * MIB + tokens * (KV_PER_TOKEN + self.buffer_per_token)

    def smallest_budget(self, tokens):
        self.tried.append(tokens)
        return self.needs(tokens) + self.kept_bytes * (len(self.tried) - 1)


@pytest.mark.parametrize("buffer_per_token", [0, 100, 1200, 20_000])
@pytest.mark.parametrize("kept_bytes", [0, 2 * MIB])
@pytest.mark.parametrize("budget", [100 * MIB, 200 * MIB, 500 * MIB, GIB, 18 * GIB])
def test_the_context_that_is_named_fits_and_is_near_the_largest(budget, kept_bytes, buffer_per_token):
    machine = Machine(buffer_per_token, kept_bytes)
    tokens, _ = _largest_context(budget, KV_PER_TOKEN, machine.smallest_budget)
    largest = (budget - machine.needs(0)) / (KV_PER_TOKEN + buffer_per_token)
    assert largest * 0.75 - 512 <= tokens <= largest
    assert len(machine.tried) <= 4
    assert max(machine.tried) * KV_PER_TOKEN <= min(budget, GIB), "a trial must not take more than the budget"


def test_no_context_fits():
    machine = Machine(1200, 0)
    assert _largest_context(60 * MIB, KV_PER_TOKEN, machine.smallest_budget) == (0, machine.needs(256))
    assert machine.tried == [256]
