"""Where blocks go: whatever the sizes, the plan holds what it must and no more than it may."""

import random

import pytest

from edgeinfer.budget import ProcessMemory
from edgeinfer.errors import BudgetError
from edgeinfer.onnx.plan import (
    Block,
    held_bytes,
    make_plan,
    place_blocks,
    place_least,
    ring_for,
    smallest_ring,
)
from edgeinfer.onnx.stage_files import Table
from edgeinfer.plan import SMALL_BYTES

MIB = 1 << 20


def random_blocks(seed):
    choice = random.Random(seed)
    sizes = [4 << 10, 100 << 10, MIB, 4 * MIB, choice.randint(1, 6000) * 4096]
    blocks = []
    for stage in range(choice.randint(1, 30)):
        offset = 0
        for _ in range(choice.randint(0, 5)):
            nbytes = choice.choice(sizes)
            blocks.append(Block(f"{stage}:{offset}", stage, offset, nbytes))
            offset += nbytes
    return blocks


def ring_never_blocks(blocks, streamed, ring):
    """The pager's ring, step by step: every stage gets its blocks before those of the last one are given
    back.
    """
    head = tail = 0
    for _ in range(3):  # the end of the ring falls elsewhere in each pass
        for stage in sorted({block.stage for block in blocks}):
            for block in (block for block in blocks if block.stage == stage and block.name in streamed):
                place = head % ring
                if place + block.nbytes > ring:
                    head += ring - place
                head += block.nbytes
                if head - tail > ring:
                    return False
            tail = head
    return True


@pytest.mark.parametrize("seed", range(60))
def test_whatever_fits_is_placed(seed):
    blocks = random_blocks(seed)
    total = sum(block.nbytes for block in blocks)
    least = held_bytes(blocks, place_least(blocks))
    for capacity in {least, (least + total) // 2, total - 4096, total, total + MIB}:
        placement = place_blocks(blocks, capacity)
        if capacity < least:
            continue
        streamed, ring = placement
        assert held_bytes(blocks, placement) <= capacity
        assert not streamed or ring_never_blocks(blocks, streamed, ring)
        assert all(block.nbytes > SMALL_BYTES for block in blocks if block.name in streamed)
        assert bool(streamed) == (total > capacity)


def test_just_enough_is_streamed_and_spread_evenly():
    blocks = [Block(str(number), number, 0, 16 * MIB) for number in range(100)]
    streamed, ring = place_blocks(blocks, 800 * MIB)
    assert ring == ring_for(blocks, streamed) == 48 * MIB
    assert 848 <= 16 * len(streamed) <= 864
    numbers = sorted(int(name) for name in streamed)
    assert max(b - a for a, b in zip(numbers, numbers[1:])) <= 2


def test_a_ring_that_costs_too_much_is_made_smaller():
    blocks = [Block(str(number), number, 0, 16 * MIB) for number in range(12)]
    streamed, ring = place_blocks(blocks, 150 * MIB)
    assert ring == 32 * MIB and len(streamed) == 5  # 48 MiB for six, which is a fifth more


def test_the_ring_is_small_where_nothing_else_fits():
    blocks = [Block(str(number), number, 0, 16 * MIB) for number in range(10)]
    streamed, ring = place_blocks(blocks, 33 * MIB)
    assert len(streamed) == 10 and ring == smallest_ring(blocks, streamed) == 32 * MIB
    assert place_blocks(blocks, 31 * MIB) is None


def test_one_large_weight_stays():
    """A ring that could hold it, and the end that stays empty, would take twice its size."""
    blocks = [Block(str(number), number, 0, size * MIB) for number, size in enumerate((8, 100, 8, 8))]
    streamed, ring = place_blocks(blocks, 117 * MIB)
    assert "1" not in streamed and ring == 16 * MIB


def test_tables_are_read_by_rows_unless_all_fits():
    table = Block("table", 0, 0, 100 * MIB, Table(0, 100 * MIB, 4096, "tokens"))
    blocks = [table, *(Block(str(number), number, 0, 8 * MIB) for number in range(1, 6))]
    tight = make_plan(blocks, 6, 100 * MIB, {"interpreter": 40 * MIB}, measuring=False)
    assert tight.rows == {"table"} and "table" not in tight.resident | tight.streamed
    roomy = make_plan(blocks, 6, 200 * MIB, {"interpreter": 40 * MIB}, measuring=False)
    assert not roomy.rows and not roomy.streamed and "table" in roomy.resident
    measuring = make_plan(blocks, 6, 200 * MIB, {"interpreter": 40 * MIB}, measuring=True)
    assert measuring.rows == {"table"} and len(measuring.streamed) == 5


def test_too_small_names_the_smallest():
    blocks = [Block(str(number), number, 0, 8 * MIB) for number in range(20)]
    overhead = {"interpreter": 50 * MIB}
    with pytest.raises(BudgetError, match=r"smallest that works is 67.0 MiB \(70254592 bytes\)") as refusal:
        make_plan(blocks, 20, 60 * MIB, overhead, measuring=False)
    plan = make_plan(blocks, 20, refusal.value.smallest_bytes, overhead, measuring=False)
    assert plan.ledger.total <= refusal.value.smallest_bytes
    assert plan.overhead_bytes == 50 * MIB
    assert plan.streamed_bytes + plan.ledger.entries["resident_weights"] == 160 * MIB


def test_code_that_the_system_took_away_while_preparing_is_counted(monkeypatch):
    """It comes back when it is used, and must find room: pages of libraries would be read again and again."""
    from edgeinfer.onnx import staged

    held = ProcessMemory(rss_bytes=50 * MIB, peak_rss_bytes=90 * MIB, file_bytes=5 * MIB)
    monkeypatch.setattr(staged, "process_memory", lambda: held)
    assert staged._held_with_code(35 * MIB) == 80 * MIB
    assert staged._held_with_code(4 * MIB) == 50 * MIB
