"""The offline optimum, the hit rates that the policies must reach, and predictors."""

import itertools
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from small_traces import small_trace

from edgeinfer.errors import BudgetError, EdgeInferError
from edgeinfer.experts.accesses import accesses
from edgeinfer.experts.belady import belady
from edgeinfer.experts.path import PathPredictor
from edgeinfer.experts.predictors import PREDICTORS, judge
from edgeinfer.experts.replay import (
    bytes_for,
    curve_sizes,
    expert_use,
    policy_hits,
    replay,
    slots_for,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.traces import made_trace  # noqa: E402

needs_policies = pytest.mark.skipif(
    find_spec("edgeinfer._native") is None, reason="the C extension is not built"
)


# ---- groups


def test_decoded_tokens_want_a_group_a_layer_and_prompts_each_expert_once():
    wanted = accesses(small_trace(decode=np.array([False, False, True])), num_slots=8)
    groups = np.split(wanted.keys, wanted.group_starts[1:])
    assert [group.tolist() for group in groups] == [[0, 1], [4, 6, 7], [3, 1], [5]]
    assert wanted.token.tolist() == [0] * 5 + [2] * 3
    assert wanted.decode.tolist() == [False] * 5 + [True] * 3


def test_a_layer_that_is_not_computed_for_a_prompt_wants_nothing():
    routed = small_trace().routed.copy()
    routed[:2, 1] = -1
    wanted = accesses(small_trace(routed=routed, decode=np.array([False, False, True])), num_slots=8)
    groups = np.split(wanted.keys, wanted.group_starts[1:])
    assert [group.tolist() for group in groups] == [[0, 1], [], [3, 1], [5]]
    assert belady(wanted.keys, wanted.group_starts, 2).tolist() == [0, 0, 0, 1, 0]


def test_a_batch_is_halved_until_its_experts_fit():
    routed = np.arange(8, dtype=np.int16).reshape(8, 1, 1)
    trace = small_trace(
        num_experts=8, routed=routed, decode=np.zeros(8, bool), expert_bytes=np.array([9], np.int64)
    )
    lengths = [np.diff([*accesses(trace, slots).group_starts, 8]).tolist() for slots in (8, 5, 1)]
    assert lengths == [[8], [4, 4], [1] * 8]
    with pytest.raises(ValueError, match="expected at least 2 slots, got 1"):
        accesses(small_trace(), 1)


# ---- Belady


def fewest_misses(groups, num_slots) -> int:
    """By trying every choice of what stays."""
    best = {frozenset(): 0}
    for group in map(frozenset, groups):
        following = {}
        for cached, misses in best.items():
            misses += len(group - cached)
            others = cached - group
            room = num_slots - len(group)
            stays = [others] if len(others) <= room else map(frozenset, itertools.combinations(others, room))
            for kept in stays:
                state = kept | group
                following[state] = min(misses, following.get(state, misses))
        best = following
    return min(best.values())


def test_no_cache_misses_less_than_belady():
    rng = np.random.default_rng(3)
    for case in range(150):
        num_keys, num_slots = int(rng.integers(3, 8)), int(rng.integers(1, 5))
        groups = [
            rng.permutation(num_keys)[: rng.integers(1, min(num_slots, num_keys) + 1)] for _ in range(14)
        ]
        keys = np.concatenate(groups).astype(np.int32)
        starts = np.cumsum([0, *map(len, groups[:-1])]).astype(np.int32)
        misses = len(keys) - int(belady(keys, starts, num_slots).sum())
        assert misses == fewest_misses([group.tolist() for group in groups], num_slots), case


def test_belady_is_quick():
    wanted = accesses(made_trace(tokens=1050), 384)
    assert len(wanted.keys) > 200_000
    begin = time.perf_counter()
    belady(wanted.keys, wanted.group_starts, 384)
    assert time.perf_counter() - begin < 5


def test_belady_refuses_a_group_larger_than_the_cache():
    with pytest.raises(ValueError, match="3 keys are wanted at once, but there are 2 slots"):
        belady(np.arange(3, dtype=np.int32), np.zeros(1, np.int32), 2)


# ---- policies on made routing: (layers, experts, used)

SHAPES = {"24x64": (24, 64, 8), "16x128": (16, 128, 8)}


@needs_policies
@pytest.mark.parametrize("shape", SHAPES)
def test_skewed_routing_comes_near_belady(shape):
    layers, experts, used = SHAPES[shape]
    trace = made_trace(600, layers, experts, used, seed=11)
    ratios, lru = [], []
    for share in (0.25, 0.5, 0.75):
        found = replay(trace, int(share * trace.num_keys), ["lrfu", "lru"])
        ratios.append(found.ratio("lrfu"))
        lru.append(found.ratio("lru"))
    assert all(ratio >= goal for ratio, goal in zip(ratios, (0.83, 0.88, 0.94), strict=True)), ratios
    assert all(a > b for a, b in zip(ratios, lru, strict=True))


@needs_policies
@pytest.mark.parametrize("shape", SHAPES)
def test_new_favourites_are_found_within_100_tokens(shape):
    layers, experts, used = SHAPES[shape]
    trace = made_trace(600, layers, experts, used, change=True, seed=12)
    for share, goal in ((0.25, 0.83), (0.5, 0.88), (0.75, 0.94)):
        slots = int(share * trace.num_keys)
        wanted = accesses(trace, slots)
        hits = policy_hits(trace, wanted, slots, "lrfu")
        best = belady(wanted.keys, wanted.group_starts, slots)
        # from the 80th to the 120th token after the change
        late = (wanted.token >= 380) & (wanted.token < 420)
        assert hits[late].sum() / best[late].sum() >= 0.9 * goal


@needs_policies
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("recurrence, exponent", [(0.8, 0.0), (0.5, 0.0), (0.5, 1.0), (0.3, 0.7), (0.2, 0.0)])
def test_the_default_follows_what_the_routing_rewards(recurrence, exponent, share):
    """Where tokens repeat their experts, counts mislead, by half; the default does as the better of both."""
    trace = made_trace(500, 12, 64, 8, recurrence=recurrence, exponent=exponent, seed=13)
    found = replay(trace, int(share * trace.num_keys), ["lrfu", "lru", "lfu"])
    assert found.ratio("lrfu") >= max(found.ratio("lru"), found.ratio("lfu")) - 0.005


@needs_policies
def test_no_policy_beats_belady_and_all_are_whole_with_room_for_all():
    trace = made_trace(80, 4, 16, 2, prompt=20)
    for slots in (2, 16, 40):
        found = replay(trace, slots)
        assert all(rates.all <= found.belady.all for rates in found.policies.values())
    full = replay(trace, trace.num_keys)
    assert len({rates for rates in full.policies.values()} | {full.belady}) == 1


@needs_policies
def test_a_trace_without_decoded_tokens_is_judged_by_its_prompts():
    found = replay(small_trace(decode=np.zeros(3, bool)), 8, ["lru"])
    assert found.policies["lru"].decode is None and found.policies["lru"].all == 0
    assert found.ratio("lru") is None


@needs_policies
def test_an_unknown_policy_names_those_that_exist():
    with pytest.raises(
        EdgeInferError, match="no cache policy 'best'. Expected one of lrfu, lru, lfu, arc, layers, gdsf"
    ):
        replay(small_trace(), 4, ["best"])


# ---- sizes and use


def test_memory_becomes_slots_by_the_mean_size():
    trace = small_trace()  # experts of 1000 and 3000 bytes
    assert [slots_for(trace, size) for size in (4000, 5999, 6000, 10**9)] == [2, 2, 3, 8]
    assert [bytes_for(trace, slots) for slots in (2, 8)] == [4000, 16000]
    with pytest.raises(
        BudgetError, match="uses 2 experts in a layer of a model, but 3999 bytes hold 1"
    ) as caught:
        slots_for(trace, 3999)
    assert caught.value.smallest_bytes == 4000
    assert slots_for(trace, caught.value.smallest_bytes) == 2


def test_curve_sizes_run_from_the_smallest_to_all():
    sizes = curve_sizes(made_trace(2, 3, 16, 2), 5)
    assert (sizes[0], sizes[-1], len(sizes)) == (2, 48, 5)
    assert curve_sizes(small_trace(), 12) == [2, 3, 4, 5, 6, 7, 8]


def test_expert_use_counts_tokens():
    assert expert_use(small_trace()).tolist() == [[2, 3, 0, 1], [1, 1, 2, 1]]


# ---- predictors


def test_recurrence_on_routing_that_repeats():
    routed = np.array([[[0, 1]], [[1, 2]], [[1, 2]]], np.int16)
    trace = small_trace(routed=routed, decode=np.ones(3, bool), expert_bytes=np.array([1], np.int64))
    found = judge(trace, "recurrence")
    # No guess for the first token; of the first two guesses one is right, then both; a third guess is 0.
    assert found.coverage == pytest.approx(2 / 3)
    assert (found.recall_k, found.precision_k) == (0.75, 0.75)
    assert (found.recall_2k, found.precision_2k) == (0.75, 3 / 5)
    assert found.recall_by_layer == [0.75]


def test_gate_predictions_are_judged_from_the_trace():
    predicted = np.full((3, 2, 4), -1, np.int16)
    predicted[1, 1] = [2, 3, 0, 1]  # 2 and 0 were used
    predicted[2, 1] = [0, 1, 2, 3]  # 1 was used, alone
    found = judge(small_trace(predicted=predicted), "gate")
    assert found.coverage == 0.5
    assert (found.recall_k, found.precision_k) == (2 / 3, 2 / 4)
    assert (found.recall_2k, found.precision_2k) == (1, 3 / 8)
    assert found.recall_by_layer == [None, 2 / 3]
    assert judge(small_trace(), "gate") is None


def test_path_learns_routes_that_depend_on_the_layer_before():
    """Expert e of a layer leads to 3 * e + 1 of the next; all are used equally, so counts do not know."""
    rng = np.random.default_rng(4)
    first = np.array([rng.permutation(16)[:2] for _ in range(600)])
    layers = [first]
    for _ in range(3):
        layers.append((3 * layers[-1] + 1) % 16)
    trace = made_trace(600, 4, 16, 2)
    trace = replace(trace, routed=np.stack(layers, axis=1).astype(np.int16), decode=np.arange(600) >= 200)
    path, recurrence = judge(trace, "path"), judge(trace, "recurrence")
    assert path.recall_by_layer[0] is None and path.coverage == 0.75
    assert path.recall_k > 0.99 and path.recall_2k > 0.99
    assert recurrence.recall_k < 0.2


def test_path_finds_new_routes():
    trace = made_trace(900, 3, 16, 2, exponent=1.0, change=True, seed=5)
    late = replace(trace, decode=np.arange(900) >= 800)
    early = replace(trace, decode=(np.arange(900) >= 350) & (np.arange(900) < 450))
    assert judge(late, "path").recall_k >= 0.9 * judge(early, "path").recall_k > 0.3


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_guess_uses_nothing_that_is_not_known_yet(name):
    """What comes later in the token, or after it, does not change a guess."""
    trace = made_trace(40, 6, 16, 2, seed=6)
    layer, token = 3, 30
    changed = trace.routed.copy()
    changed[token, layer:] = (changed[token, layer:] + 5) % 16
    changed[token + 1 :] = (changed[token + 1 :] + 3) % 16
    ranks = []
    for routed in (trace.routed, changed):
        predictor = PREDICTORS[name](replace(trace, routed=routed))
        ranks.append([predictor.rank(step, 4).copy() for step in range(token + 1)][-1])
    assert ranks[0].shape[0] == 6
    assert np.array_equal(ranks[0][: layer + 1], ranks[1][: layer + 1])


def test_one_layer_has_no_path():
    trace = made_trace(10, 1, 8, 2)
    assert (PathPredictor(trace).rank(0, 4) == -1).all()
    assert judge(trace, "path") is None
