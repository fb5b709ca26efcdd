"""Experts in a cache of recycled slots: the same logits as stock llama.cpp, to the bit, whatever is missed and evicted."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from streaming import make_plan, some_tokens, stock_logits
from tiny import tiny_model

import edgeinfer.engines.paging
from edgeinfer import _native
from edgeinfer.engines.opening import Prepared
from edgeinfer.engines.pools import gates_of
from edgeinfer.modelfile import read_model_file
from edgeinfer.plan import plan_pools

ARCHITECTURES = ["mixtral", "qwen2moe", "qwen3moe", "olmoe", "deepseek2", "gpt-oss", "grovemoe"]
# One token, a batch that wants many experts, then decoding: experts are missed, hit, and evicted.
BATCHES = [some_tokens(1), some_tokens(40), *([token] for token in some_tokens(30))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@contextlib.contextmanager
def expert_engine(path, slots, *, policy="lru", predict=True, ubatch=64, **plan_options):
    """An engine with this many slots for each kind of experts, all other weights resident."""
    file = read_model_file(path)
    prepared = Prepared(file, context_length=256, threads=1, ubatch=ubatch, outputs_max=ubatch)
    pools = plan_pools(prepared.uses, 0, file.num_experts_used, ubatch)
    pools = replace(pools, slots=(slots,) * len(pools.slots), policy=policy, predict=predict)
    plan = make_plan("everything", prepared.uses, resident=frozenset(), streamed=frozenset(), ring_bytes=0)
    dense = {use.name for use in prepared.uses} - pools.names - plan.rows
    tied = {use.name for use in prepared.uses if not use.rows} & plan.rows
    plan = replace(plan, resident=frozenset(dense | tied), pools=pools, **plan_options)
    engine = prepared.start(plan)
    engine.outputs = "all"
    try:
        yield engine
    finally:
        engine.close()


def cached_logits(engine, batches):
    """As `stock_logits`, whatever batches the engine makes of each."""
    logits = []
    decode = engine.context.decode

    def keep(tokens, outputs):
        decode(tokens, outputs)
        logits.extend(engine.context.logits(i).copy() for i in range(len(tokens)))

    engine.context.decode = keep
    for batch in batches:
        engine.prefill(batch)
    return np.stack(logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("slots", [8, 11])
def test_logits_equal_stock_with_experts_missed_and_evicted(models, arch, slots):
    path = tiny_model(models, arch, "Q4_0", layers=4)
    expected = stock_logits(path, BATCHES)
    with expert_engine(path, slots) as engine:
        found = cached_logits(engine, BATCHES)
        counted = engine.expert_statistics()
    assert np.array_equal(found, expected)
    assert counted["wanted"] > counted["hits"] > 0
    assert counted["prefill_wanted"] > counted["prefill_hits"]


def without_gates(file, pools, resident):
    """As if no router could be asked ahead: layers are predicted by the paths of routing."""
    gates, count = gates_of(file, pools, resident)
    return [(0, 0, 0, experts) for *_, experts in gates], count


@pytest.mark.parametrize("policy", _native.Policy.names())
@pytest.mark.parametrize("predictor", [None, "gate", "paths"])
def test_every_policy_and_predictor_gives_the_same_logits(models, monkeypatch, policy, predictor):
    path = tiny_model(models, "olmoe", "Q4_K", layers=4)
    expected = stock_logits(path, BATCHES)
    if predictor == "paths":
        monkeypatch.setattr(edgeinfer.engines.paging, "gates_of", without_gates)
    with expert_engine(path, 9, policy=policy, predict=predictor is not None) as engine:
        assert np.array_equal(cached_logits(engine, BATCHES), expected)
        assert (engine.expert_statistics()["predicted"] > 0) == (predictor is not None)


def test_paths_of_routing_are_learned(models, monkeypatch):
    """A text that repeats itself takes the same paths again."""
    monkeypatch.setattr(edgeinfer.engines.paging, "gates_of", without_gates)
    path = tiny_model(models, "olmoe", "Q4_K", layers=4)
    with expert_engine(path, 9) as engine:
        engine.decode([7])  # gates are given behind the first pass
        for _ in range(60):
            engine.decode([7])
            engine.truncate(1)
        counted = engine.expert_statistics()
    assert counted["predicted"] > 0
    assert counted["predicted_right"] > 0.9 * counted["predicted"]


def test_nothing_is_read_ahead_while_that_does_not_pay(models, monkeypatch):
    class NeverPays:
        predicting = False

        def record(self, seconds):
            assert seconds > 0

    monkeypatch.setattr(edgeinfer.engines.paging, "PredictionTrial", NeverPays)
    path = tiny_model(models, "olmoe", "Q4_K", layers=4)
    with expert_engine(path, 9) as engine:
        for token in some_tokens(20):
            engine.decode([token])
        assert engine.expert_statistics()["predicted"] == 0


@pytest.mark.parametrize("options", [{"direct": False}, {"chunk_bytes": 4096, "reading_threads": 1}])
def test_the_ways_of_reading(models, options):
    path = tiny_model(models, "qwen3moe", "Q8_0", alignment=4096)
    expected = stock_logits(path, BATCHES)
    with expert_engine(path, 8, **options) as engine:
        assert np.array_equal(cached_logits(engine, BATCHES), expected)


def test_a_batch_that_wants_more_experts_than_there_are_slots_is_made_smaller(models):
    path = tiny_model(models, "mixtral", "Q4_0")
    tokens = some_tokens(40)
    with expert_engine(path, 2) as engine:  # the experts of one token
        engine.prefill(tokens)
        found = engine.context.logits().copy()
        assert engine.position == len(tokens)
    expected = stock_logits(path, [[token] for token in tokens])[-1]
    assert np.array_equal(found, expected)
