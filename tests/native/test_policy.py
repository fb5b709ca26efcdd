"""Every policy against a plain version of the same rule, decision by decision, on random traces."""

import random
import threading
import time

import numpy as np
import pytest
from plain_policies import COSTS, HALF_LIFE, LAYERS, NUM_KEYS, PLAIN

native = pytest.importorskip("edgeinfer._native", reason="the C extension is not built")


def make(name, num_slots, num_keys=NUM_KEYS, **options):
    if name == "layers":
        options.setdefault("layers", LAYERS if num_keys == NUM_KEYS else np.zeros(num_keys, np.int32))
    return native.Policy(name, num_keys, num_slots, **options)


def draw(rng, phase):
    """A key; a few are popular, and which ones changes with the phase."""
    return (min(int(rng.paretovariate(0.7)) - 1, NUM_KEYS - 1) * 7 + phase * 11) % NUM_KEYS


def test_every_policy_has_a_plain_version():
    assert set(native.Policy.names()) == set(PLAIN)


@pytest.mark.parametrize("num_slots", [1, 2, 7, 20, NUM_KEYS])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_decides_as_the_plain_version(name, num_slots):
    rng = random.Random(f"{name} {num_slots}")
    policy = make(name, num_slots, layers=LAYERS, costs=COSTS, half_life=HALF_LIFE)
    plain = PLAIN[name](num_slots)
    cached = set()

    def make_room(pinned):
        expected = next((key for key in plain.order() if key not in pinned), None)
        assert policy.victim(pinned) == expected
        if expected is not None:
            for side in (policy, plain):
                side.remove(expected)
            cached.remove(expected)
        return expected is not None

    def bring(key):
        for side in (policy, plain):
            side.insert(key)
        cached.add(key)

    for step in range(600):
        group = {draw(rng, step // 200) for _ in range(rng.randint(1, min(4, num_slots)))}
        for key in group:
            assert policy.access(key) == (key in cached)
            plain.access(key, key in cached)
        for key in sorted(group - cached):
            if len(cached) < num_slots or make_room(group):
                bring(key)
        ahead = draw(rng, step // 200)
        if step % 5 == 0 and ahead not in cached and num_slots > 1:  # read ahead, without an access
            if len(cached) < num_slots or make_room(group):
                bring(ahead)
        if step % 50 == 0:  # nothing or all but one may go
            assert policy.victim(cached) is None
            assert policy.victim(cached - {ahead}) == (ahead if ahead in cached else None)
    if name == "arc" and num_slots == 7:
        assert plain.adapted == {"up", "down"}  # the trace did reach both kinds of ghosts
    if name == "lrfu" and num_slots == 7:
        assert len(plain.leaders) >= 3


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_replay_is_the_same_calls_one_by_one(name):
    rng = np.random.default_rng(5)
    groups = [rng.permutation(NUM_KEYS)[: rng.integers(0, 5)] for _ in range(2000)]
    keys = np.concatenate(groups).astype(np.int32)
    starts = np.cumsum([0, *map(len, groups[:-1])]).astype(np.int32)
    marks = np.full(len(keys), 9, np.uint8)
    hits = make(name, 9).replay(keys, starts, marks)

    policy, cached, expected = make(name, 9), set(), []
    for group in groups:
        expected += [policy.access(int(key)) for key in group]
        for key in map(int, group):
            if key in cached:
                continue
            if len(cached) == 9:
                victim = policy.victim(group.tolist())
                policy.remove(victim)
                cached.remove(victim)
            policy.insert(key)
            cached.add(key)
    assert marks.tolist() == expected
    assert hits == sum(expected) and 0 < hits < len(keys)


def test_counts_keep_their_order_for_ever():
    """Weights of new uses grow past 1e100 many times over in this trace."""
    policy = native.Policy("lfu", 4, 2, half_life=0.25)
    for step in range(20_000):
        policy.access(0 if step % 3 else 1)
    for key in (0, 1):
        policy.insert(key)
    assert policy.victim() == 1
    for _ in range(200):
        policy.access(1)
    assert policy.victim() == 0
    assert [policy.victim([0]), policy.victim([0, 1])] == [1, None]


def test_a_popular_expert_outlives_a_sweep_only_where_uses_are_counted():
    """A prefill that wants every expert once: "lfu" keeps the popular ones, "lru" has none of them left."""
    popular, rest = list(range(8)), list(range(8, NUM_KEYS))
    trace = np.array(popular * 20 + rest + popular, np.int32)
    starts = np.arange(len(trace), dtype=np.int32)
    last = {}
    for name in ("lfu", "lru"):
        marks = np.zeros(len(trace), np.uint8)
        make(name, 9).replay(trace, starts, marks)
        last[name] = int(marks[-8:].sum())
    assert last == {"lfu": 8, "lru": 0}


def test_shallow_layers_keep_their_share():
    policy = make("layers", 10, shallow_share=0.3)
    order = [0, 1, 2, 3, *range(20, 26)]  # four of the shallow layers, then six deep ones
    for key in order:
        policy.insert(key)
    gone = []
    for _ in order:
        gone.append(policy.victim())
        policy.remove(gone[-1])
    assert gone == [0, 20, 21, 22, 23, 24, 25, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_victim_is_found_fast_among_3000(name):
    """It is asked for while a layer's experts are wanted, some hundred times a token."""
    num_keys, groups = 6000, 12_000
    rng = np.random.default_rng(1)
    keys = np.concatenate([rng.choice(num_keys, 8, replace=False) for _ in range(groups)]).astype(np.int32)
    starts = np.arange(0, len(keys), 8, dtype=np.int32)
    policy = make(name, 3000, num_keys)
    begin = time.perf_counter()
    hits = policy.replay(keys, starts)
    seconds = time.perf_counter() - begin
    assert hits < 0.6 * len(keys)  # so it was asked for a victim about every second time
    assert seconds / len(keys) < 20e-6


def test_replay_leaves_other_threads_running():
    keys = np.random.default_rng(2).integers(0, 3000, 1_500_000, dtype=np.int32)
    policy, counts = native.Policy("lfu", 3000, 1500), [0]
    starts = np.arange(len(keys), dtype=np.int32)
    running = threading.Thread(target=policy.replay, args=(keys, starts))
    running.start()
    while running.is_alive():
        counts[0] += 1
    assert counts[0] > 100


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("best", 4, 2), {}, "there is no policy best"),
        (("lru", 0, 2), {}, "cannot be made with 0 keys in 2 slots"),
        (("lru", 4, 0), {}, "cannot be made with 4 keys in 0 slots"),
        (("layers", 4, 2), {}, 'layers for "layers"'),
        (("lfu", 4, 2), {"half_life": float("nan")}, "a half-life of at least one use"),
        (("lfu", 4, 2), {"half_life": 0.01}, "a half-life of at least one use"),
        (("layers", 4, 2), {"layers": np.zeros(4, np.int32), "shallow_share": 1.5}, "a share from 0 to 1"),
        (("layers", 4, 2), {"layers": np.zeros(3, np.int32)}, "expected the layers of 4 keys, got 3"),
        (("layers", 4, 2), {"layers": np.full(4, -1, np.int32)}, "expected layers from 0"),
        (("gdsf", 4, 2), {"costs": np.full(4, -1, np.float32)}, "costs from 0"),
    ],
)
def test_refuses_what_cannot_be(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        native.Policy(*arguments, **options)
    assert message in str(caught.value)


def test_refuses_arrays_of_another_type():
    with pytest.raises(TypeError, match="expected one-dimensional layers as int32"):
        native.Policy("layers", 4, 2, layers=np.zeros(4, np.int64))
    policy = native.Policy("lru", 4, 2)
    with pytest.raises(TypeError, match="expected one-dimensional keys as int32, got 2 dimensions"):
        policy.replay(np.zeros((2, 2), np.int32), np.zeros(1, np.int32))
    with pytest.raises(TypeError, match="group starts as int32"):
        policy.replay(np.zeros(2, np.int32), np.zeros(1))


@pytest.mark.parametrize(
    "keys, starts, message",
    [
        ([0, 4], [0], "expected keys from 0 to below 4, got 4 at 1"),
        ([-1], [0], "got -1 at 0"),
        ([0, 1], [1], "expected group starts that rise from 0"),
        ([0, 1], [], "expected group starts that rise from 0, got none"),
        ([0, 1], [0, 3], "at most 2, got 3 at 1"),
        ([0, 1], [0, 2, 1], "got 1 at 2"),
        ([3, 0, 1, 2], [0, 1], "group 1 wants more keys at once than the 2 slots hold"),
    ],
)
def test_replay_refuses_a_bad_trace(keys, starts, message):
    policy = native.Policy("arc", 4, 2)
    with pytest.raises(ValueError, match=message):
        policy.replay(np.array(keys, np.int32), np.array(starts, np.int32))


def test_marks_must_fit():
    policy = native.Policy("lru", 4, 2)
    with pytest.raises(ValueError, match="expected a mark for each of 2 keys, got 1"):
        policy.replay(np.zeros(2, np.int32), np.zeros(1, np.int32), np.zeros(1, np.uint8))


def test_the_cache_is_not_overfilled_and_keys_are_checked():
    policy = native.Policy("lru", 4, 1)
    policy.insert(0)
    policy.insert(0)
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        policy.insert(1)
    policy.remove(2)
    policy.remove(0)
    assert policy.victim() is None
    with pytest.raises(IndexError, match="expected a key below 4, got 4"):
        policy.access(4)
    with pytest.raises(OverflowError):
        policy.access(-1)
