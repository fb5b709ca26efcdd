"""Experts in a cache of recycled slots: the same logits as stock llama.cpp, to the bit, whatever is missed and evicted."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from streaming import make_plan, some_tokens, stock_logits
from tiny import tiny_model

from edgeinfer import _native
from edgeinfer.engines.opening import Prepared
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


@pytest.mark.parametrize("policy", _native.Policy.names())
@pytest.mark.parametrize("predict", [False, True])
def test_every_policy_and_prediction_gives_the_same_logits(models, policy, predict):
    path = tiny_model(models, "olmoe", "Q4_K", layers=4)
    expected = stock_logits(path, BATCHES)
    with expert_engine(path, 9, policy=policy, predict=predict) as engine:
        assert np.array_equal(cached_logits(engine, BATCHES), expected)
        assert (engine.expert_statistics()["predicted"] > 0) == predict


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
