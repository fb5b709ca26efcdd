"""What a pager delivers is what the file holds, whatever is asked for in whatever order."""

import random
import sys
import threading
import time
from array import array
from pathlib import Path

import pytest
from blocks import PAGE, RESIDENT, ROWS, STREAMED, Paged, protection, write_random

from edgeinfer import _native


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.bin"
    write_random(path, 40 * PAGE + 1234)  # the last block of the disk is not full
    return path


def random_blocks(seed: int, count: int, size: int) -> list[tuple[int, int, int]]:
    choose = random.Random(seed)
    blocks = []
    for _ in range(count):
        bytes_ = choose.choice([1, 31, PAGE - 1, PAGE, PAGE + 1, choose.randrange(1, 9 * PAGE)])
        offset = choose.choice([0, size - bytes_, choose.randrange(0, size - bytes_ + 1)])
        blocks.append((STREAMED, offset, bytes_))
    return blocks


def neighbours(count: int, size: int, seed: int) -> list[tuple[int, int]]:
    """`count` ranges that fill a file without a gap, as tensors do."""
    cuts = sorted(random.Random(seed).sample(range(1, size), count - 1))
    return [(start, end - start) for start, end in zip([0, *cuts], [*cuts, size])]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("seed", range(4))
def test_streamed_blocks_of_any_place_and_size(path, direct, seed):
    blocks = random_blocks(seed, 12, path.stat().st_size)
    order = [random.Random(seed).randrange(12) for _ in range(30)]
    with Paged(path, blocks, order, ring=11 * PAGE, direct=direct) as paged:
        for _ in range(4):
            paged.run_pass()
        statistics = paged.pager.statistics()
    assert statistics["passes"] == 4
    assert statistics["reorders"] == 0
    assert statistics["ring_wraps"] > 4


def test_a_file_system_without_direct_reads():
    with Path("/proc/mounts").open() as mounts:
        places = [line.split()[1] for line in mounts if line.split()[0] == "tmpfs"]
    path = Path("/dev/shm") / f"edgeinfer-test-{threading.get_native_id()}.bin"
    if "/dev/shm" not in places:
        pytest.skip("no tmpfs on /dev/shm")
    try:
        data = write_random(path, 9 * PAGE + 5)
        with Paged(
            path, [(STREAMED, 3, len(data) - 3), (STREAMED, 0, PAGE)], [0, 1], ring=12 * PAGE
        ) as paged:
            for _ in range(3):
                paged.run_pass()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("chunk", [1, PAGE, 3 * PAGE + 1, 1 << 20])
def test_resident_and_streamed_neighbours(path, direct, chunk):
    ranges = neighbours(25, path.stat().st_size, seed=chunk)
    blocks = [(STREAMED if i % 3 == 0 else RESIDENT, *range_) for i, range_ in enumerate(ranges)]
    with Paged(path, blocks, range(25), ring=45 * PAGE, direct=direct, chunk=chunk) as paged:
        for _ in range(3):
            paged.run_pass()
        statistics = paged.pager.statistics()
        assert all(paged.home(i) == paged.wanted(i) for i in range(25) if i % 3)
        assert statistics["resident_bytes"] == sum(size for kind, _, size in blocks if kind == RESIDENT)


def test_nothing_is_written_outside_a_resident_block(path):
    blocks = [(RESIDENT, 1000, 5 * PAGE), (RESIDENT, 9 * PAGE - 1, 3), (RESIDENT, 20 * PAGE, PAGE)]
    with Paged(path, blocks, [0, 1, 2]) as paged:
        paged.run_pass()
        memory = bytearray(memoryview(paged.space))
        for _, offset, size in blocks:
            memory[offset : offset + size] = bytes(size)
    assert not any(memory)


def test_each_resident_block_is_read_once(path):
    with Paged(path, [(RESIDENT, 0, 3 * PAGE), (RESIDENT, 8 * PAGE, PAGE)], [0, 1, 0, 1, 1]) as paged:
        for _ in range(5):
            paged.run_pass()
        assert paged.pager.statistics()["read_bytes"] == 4 * PAGE


def test_a_ring_as_large_as_the_largest_block(path):
    blocks = [(STREAMED, 0, 4 * PAGE), (STREAMED, 9 * PAGE, PAGE), (STREAMED, 5 * PAGE, 3 * PAGE)]
    with Paged(path, blocks, [0, 1, 2, 1, 0, 0], ring=4 * PAGE) as paged:
        for _ in range(50):
            paged.run_pass()
        assert paged.pager.statistics()["ring_wraps"] >= 150


def test_two_blocks_are_held_at_once_and_their_bytes_stay(path):
    blocks = [(STREAMED, i * 3 * PAGE + i, 2 * PAGE) for i in range(8)]
    with Paged(path, blocks, range(8), ring=7 * PAGE) as paged:
        for _ in range(6):
            paged.pager.begin_pass()
            for first in range(0, 8, 2):
                places = [paged.acquire(first), paged.acquire(first + 1)]
                assert abs(places[0] - places[1]) >= 2 * PAGE
                paged.pager.release()
            paged.pager.end_pass()


def test_a_held_block_that_is_asked_for_again_is_where_it_was(path):
    blocks = [(STREAMED, i * 3 * PAGE + i, 2 * PAGE) for i in range(3)]
    with Paged(path, blocks, range(3), ring=9 * PAGE) as paged:
        for _ in range(6):
            paged.pager.begin_pass()
            places = [paged.acquire(number) for number in (0, 1, 0, 2, 1, 0)]
            assert places[2] == places[5] == places[0] and places[4] == places[1]
            paged.pager.release()
            paged.run_pass([0, 1, 2])


def test_a_whole_pass_held_and_its_first_block_again(path):
    blocks = [(STREAMED, i * 3 * PAGE, PAGE) for i in range(3)]
    with Paged(path, blocks, range(3), ring=4 * PAGE) as paged:
        for _ in range(3):
            for number in (0, 1, 2, 0):
                paged.acquire(number)
            paged.pager.release()
            for number in (1, 2, 0, 1, 2):
                time.sleep(
                    0.01
                )  # everything that can be read ahead is: it must not lie on what is still to be used
                paged.acquire(number)
                paged.pager.release()


def test_a_block_a_whole_pass_ahead_of_a_held_one_is_refused_not_waited_for(path):
    blocks = [(STREAMED, i * 3 * PAGE, PAGE) for i in range(4)]
    with Paged(path, blocks, range(4), ring=PAGE) as paged:
        paged.acquire(0)
        with pytest.raises(OSError, match="ring is too small"):  # the held one is at the only place
            paged.acquire(3)
    with Paged(path, blocks, range(4), ring=2 * PAGE) as paged:
        paged.acquire(0)
        paged.acquire(3)
        with pytest.raises(OSError, match="a whole pass after one that is still in use"):
            paged.acquire(1)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_use(path, seed):
    """Asking for something else than what comes next costs reads, and never gives other bytes."""
    choose = random.Random(seed)
    ranges = neighbours(10, path.stat().st_size, seed)
    blocks = [(RESIDENT if choose.random() < 0.3 else STREAMED, *range_) for range_ in ranges]
    with Paged(path, blocks, range(10), ring=60 * PAGE, chunk=PAGE) as paged:
        for _ in range(15):
            order = list(range(10))
            for _ in range(choose.randrange(4)):
                order.insert(choose.randrange(10), order.pop(choose.randrange(10)))
            paged.run_pass(order[: choose.randrange(1, 11)])
        assert paged.pager.statistics()["reorders"] > 0


def test_a_resident_block_out_of_order_costs_no_read(path):
    blocks = [(STREAMED, 0, PAGE), (RESIDENT, 5 * PAGE, PAGE), (STREAMED, 9 * PAGE, PAGE)]
    with Paged(path, blocks, [0, 1, 2], ring=8 * PAGE) as paged:
        paged.run_pass()
        for _ in range(10):
            paged.run_pass([1, 0, 2])
            paged.run_pass([0, 2, 1])
        statistics = paged.pager.statistics()
    assert statistics["read_bytes"] <= (1 + 2 * 21 + 2) * PAGE
    assert statistics["reorders"] >= 20


def test_passes_that_end_early_start_again_at_the_front(path):
    blocks = [(STREAMED, i * 3 * PAGE + 7, PAGE) for i in range(9)]
    with Paged(path, blocks, range(9), ring=5 * PAGE) as paged:
        for length in (1, 5, 9, 2, 8, 9, 0, 3, 9):
            paged.run_pass(range(length))


def test_blocks_that_are_skipped(path):
    blocks = [(STREAMED, i * 3 * PAGE + 7, PAGE) for i in range(9)]
    with Paged(path, blocks, range(9), ring=5 * PAGE) as paged:
        for _ in range(5):
            paged.run_pass([0, 1, 7, 8])
            paged.run_pass([3, 5])


def test_the_ring_stays_while_the_pager_uses_it(path):
    paged = Paged(path, [(STREAMED, 0, 4 * PAGE)], [0], ring=5 * PAGE)  # nobody else holds the ring
    for _ in range(3):
        paged.run_pass()
    paged.pager.close()


def test_rows_come_to_their_places_and_go(path):
    row, first = 300, 3 * PAGE + 100
    table = (ROWS, first, 100 * row)
    with Paged(path, [table], []) as paged:
        home = paged.space.address + first
        _native.guard_pages(home // PAGE * PAGE, -(-(home + 100 * row) // PAGE) * PAGE - home // PAGE * PAGE)
        for rows in ([5], [0, 99], [7, 7, 3, 8, 60], list(range(100)), []):
            paged.pager.begin_pass()
            paged.pager.open_rows(0, row, array("i", rows))
            for number in rows:
                start = number * row
                got = bytes(memoryview(paged.space)[first + start : first + start + row])
                assert got == paged.wanted(0)[start : start + row]
            paged.pager.close_rows(0)
            assert protection(home + PAGE) == "---p"
            paged.pager.end_pass()
        assert paged.pager.statistics()["row_bytes"] >= 100 * row


def test_rows_write_nothing_outside_their_table(path):
    with Paged(path, [(ROWS, PAGE + 100, 20 * 50)], []) as paged:
        paged.pager.open_rows(0, 50, array("i", range(20)))
        memory = bytearray(memoryview(paged.space))
        memory[PAGE + 100 : PAGE + 1100] = bytes(1000)
    assert not any(memory)


def test_rows_in_a_buffer_that_is_not_aligned(path):
    with Paged(path, [(ROWS, 0, 4 * PAGE)], []) as paged:
        numbers = b"x" + array("i", [3, 1]).tobytes()
        paged.pager.open_rows(0, PAGE, memoryview(numbers)[1:])
        assert paged.home(0)[PAGE : 2 * PAGE] == paged.wanted(0)[PAGE : 2 * PAGE]
        assert paged.home(0)[3 * PAGE :] == paged.wanted(0)[3 * PAGE :]


def test_statistics_add_up(path):
    blocks = [(STREAMED, 0, 2 * PAGE), (RESIDENT, 3 * PAGE, PAGE), (STREAMED, 6 * PAGE, 3 * PAGE)]
    with Paged(path, blocks, [0, 1, 2], ring=5 * PAGE) as paged:
        for _ in range(4):
            paged.pager.begin_pass()
            for done, number in enumerate((0, 1, 2)):
                assert paged.pager.statistics()["pass_fraction"] == pytest.approx(done / 3)
                paged.acquire(number)
                paged.pager.release()
            paged.pager.end_pass()
        statistics = paged.pager.statistics()
    assert statistics["resident_bytes"] == PAGE
    # at most what the ring holds is read ahead of the next pass
    assert 4 * 5 * PAGE + PAGE <= statistics["read_bytes"] <= 5 * 5 * PAGE + PAGE
    assert statistics["passes"] == 4
    assert statistics["busy_seconds"] > 0
    assert statistics["wait_seconds"] >= 0 and statistics["waits"] >= 0
    assert statistics["row_bytes"] == statistics["reorders"] == 0


def test_closing_gives_everything_back(path):
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))

    def use() -> None:
        with Paged(path, [(STREAMED, 0, 2 * PAGE), (RESIDENT, 3 * PAGE, 9)], [0, 1], ring=3 * PAGE) as paged:
            paged.run_pass()
            assert held()[1] >= before[1] + 3
        paged.pager.close()  # again is no error
        Paged(path, [(STREAMED, 0, 2 * PAGE)], [0], ring=3 * PAGE)  # never closed

    before = held()
    use()
    mappings = Path("/proc/self/maps").read_text().count("\n")
    types = sys.getrefcount(_native.Pager)
    for _ in range(20):
        use()
    assert held() == before
    assert sys.getrefcount(_native.Pager) < types + 10
    assert Path("/proc/self/maps").read_text().count("\n") < mappings + 10
