"""The planner: within the budget, spread evenly, streaming no more than it must."""

import pytest

from edgeinfer.errors import BudgetError
from edgeinfer.plan import (
    SMALL_BYTES,
    Device,
    WeightUse,
    make_plan,
    predict,
    smallest_ring,
)

MIB = 1 << 20
OVERHEAD = {"interpreter": 50 * MIB, "kv_cache": 20 * MIB}
DEVICE = Device(disk_bytes_per_second=1e9, compute_bytes_per_second={"Q4_0": 4e9})


def model(layers: int = 16, vocabulary_mib: int = 40) -> list[WeightUse]:
    """A llama-like order of use: 4 attention and 3 feed-forward weights and 2 norms a layer."""
    uses = [WeightUse("token_embd.weight", vocabulary_mib * MIB, rows=True)]
    for n in range(layers):
        uses.append(WeightUse(f"blk.{n}.attn_norm.weight", 8192))
        uses += [WeightUse(f"blk.{n}.attn_{part}.weight", 6 * MIB) for part in "qkvo"]
        uses.append(WeightUse(f"blk.{n}.ffn_norm.weight", 8192))
        uses += [WeightUse(f"blk.{n}.ffn_{part}.weight", 16 * MIB) for part in ("gate", "up", "down")]
    return [*uses, WeightUse("output.weight", vocabulary_mib * MIB)]


def plan_for(uses, budget):
    return make_plan(uses, budget, OVERHEAD, frozenset({"token_embd.weight"}))


def speed_for(uses, plan):
    return predict(plan, uses, DEVICE, {use.name: "Q4_0" for use in uses})


def sizes(uses):
    return {use.name: use.nbytes for use in uses}


def total(uses, names):
    return sum(size for name, size in sizes(uses).items() if name in names)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.78, 0.95])
def test_what_is_held_stays_within_the_budget_and_little_of_it_is_left_unused(share):
    uses = model()
    budget = int(share * total(uses, sizes(uses))) + sum(OVERHEAD.values())
    plan = plan_for(uses, budget)
    assert plan.ledger.total <= budget
    assert plan.ledger.entries["resident_weights"] == total(uses, plan.resident)
    assert plan.ledger.total >= budget - 16 * MIB  # less than one more weight would fit
    assert plan.resident.isdisjoint(plan.streamed)
    assert plan.resident | plan.streamed | plan.rows == set(sizes(uses))


@pytest.mark.parametrize("share", [0.3, 0.45, 0.78])
def test_streamed_weights_are_spread_evenly_over_the_pass(share):
    uses = model(layers=32)
    budget = int(share * total(uses, sizes(uses))) + sum(OVERHEAD.values())
    plan = plan_for(uses, budget)
    products = [use for use in uses if use.name not in plan.rows]
    quarter = len(products) // 4
    parts = [products[i * quarter : (i + 1) * quarter] for i in range(4)]
    shares = [
        sum(u.nbytes for u in part if u.name in plan.streamed) / sum(u.nbytes for u in part) for part in parts
    ]
    assert max(shares) - min(shares) < 0.15, shares


def test_small_weights_and_views_stay_and_tables_are_read_by_rows():
    uses = [*model(), WeightUse("rope_table", 10 * MIB, through_view=True)]
    plan = plan_for(uses, 300 * MIB)
    assert all(name in plan.resident for name, size in sizes(uses).items() if size <= SMALL_BYTES)
    assert "rope_table" in plan.resident
    assert plan.rows == {"token_embd.weight"}


def test_a_tied_embedding_is_looked_up_by_rows_and_multiplied_as_a_whole():
    uses = [use for use in model() if use.name != "output.weight"]
    uses.append(WeightUse("token_embd.weight", 40 * MIB))
    plan = plan_for(uses, 300 * MIB)
    assert "token_embd.weight" in plan.rows
    assert "token_embd.weight" in plan.resident | plan.streamed


def test_the_ring_holds_the_largest_streamed_weight_and_the_next():
    uses = model()
    for budget in range(160 * MIB, 1100 * MIB, 20 * MIB):
        plan = plan_for(uses, budget)
        streamed = [size for name, size in sizes(uses).items() if name in plan.streamed]
        assert plan.ring_bytes >= smallest_ring(streamed)


def test_the_smallest_budget_that_is_named_works_and_one_below_does_not():
    uses = model()
    with pytest.raises(BudgetError, match="the smallest that works is") as refused:
        plan_for(uses, 100 * MIB)
    smallest = refused.value.smallest_bytes
    assert plan_for(uses, smallest).streamed
    with pytest.raises(BudgetError):
        plan_for(uses, smallest - 2 * MIB)


def test_more_memory_never_predicts_less_speed_and_all_of_it_streams_nothing():
    uses = model()
    budgets = range(200 * MIB, 1400 * MIB, 50 * MIB)
    speeds = [speed_for(uses, plan_for(uses, budget)) for budget in budgets]
    assert all(later >= 0.97 * earlier for earlier, later in zip(speeds, speeds[1:]))
    rich = plan_for(uses, 1400 * MIB)
    assert not rich.streamed and rich.ring_bytes == 0
    compute = total(uses, rich.resident) / 4e9
    assert speed_for(uses, rich) == pytest.approx(1 / compute)


def test_the_prediction_is_the_slower_of_disk_and_processor():
    uses = model()
    plan = plan_for(uses, 400 * MIB)
    assert speed_for(uses, plan) == pytest.approx(1e9 / total(uses, plan.streamed))


def test_rows_that_are_looked_up_are_not_counted_as_computed():
    uses = model()
    whole = make_plan(uses, 1400 * MIB, OVERHEAD)  # the table is kept too
    assert speed_for(uses, whole) == pytest.approx(speed_for(uses, plan_for(uses, 1400 * MIB)))


def test_experts_are_computed_and_missed_by_the_share_that_a_token_uses():
    uses = [WeightUse(f"blk.{n}.ffn_{part}_exps.weight", 64 * MIB, experts=16, layer=n)
            for n in range(4) for part in ("gate", "up", "down")]
    plan = make_plan(uses, sum(OVERHEAD.values()) + 450 * MIB, OVERHEAD, experts_used=2)
    held = plan.pools.slots[0] / 64
    assert plan.ledger.total <= plan.budget_bytes
    assert 0.4 < held < 0.6
    missed = 12 * 64 * MIB * 2 / 16 * (1 - held)
    assert speed_for(uses, plan) == pytest.approx(1e9 / missed)
