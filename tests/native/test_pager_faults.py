"""Disks and file systems that refuse, fail, dawdle or cut reads short, as shim.c makes them."""

import pytest
from blocks import PAGE
from compiler import HERE, build_library, run_shimmed

START = """
import ctypes, os, threading, time
from array import array
from pathlib import Path
from blocks import PAGE, RESIDENT, ROWS, STREAMED, Paged, write_random
path = Path("weights.bin").absolute()
write_random(path, 20 * PAGE + 777)
"""

# Neighbours share pages, as tensors do: a third is streamed, the rest is resident, one is a table of rows.
MIXED = (
    START
    + """
cuts = [0, 100, 3000, 3 * PAGE + 5, 5 * PAGE, 5 * PAGE + 9, 9 * PAGE + 1, 13 * PAGE - 1, 16 * PAGE]
cuts.append(20 * PAGE + 777)
blocks = [(STREAMED if i % 3 == 0 else RESIDENT, a, b - a) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))]
blocks[7] = (ROWS, *blocks[7][1:])
order = [i for i in range(9) if i != 7]
row = 100
def run(passes):
    with Paged(path, blocks, order, ring=11 * PAGE, threads=4) as paged:
        for _ in range(passes):
            paged.pager.begin_pass()
            paged.pager.open_rows(7, row, array("i", [0, 30, blocks[7][2] // row - 1]))
            for number in order:
                paged.acquire(number)
                for before in order[: order.index(number)]:
                    if blocks[before][0] == RESIDENT:
                        assert paged.home(before) == paged.wanted(before), f"block {before} at {number}"
                paged.pager.release()
            for number in (0, 30, blocks[7][2] // row - 1):
                assert paged.home(7)[number * row:][:row] == paged.wanted(7)[number * row:][:row]
            paged.pager.end_pass()
        return paged.pager.statistics()
"""
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_library(HERE / "shim.c", tmp_path_factory.mktemp("shim") / "shim.so", "-ldl")


@pytest.fixture
def run(shim, tmp_path):
    return lambda code, **settings: run_shimmed(shim, tmp_path, code, file="weights.bin", **settings)


def test_a_file_system_that_opens_directly_and_then_refuses_to_read(run):
    run(MIXED + "assert run(3)['direct'] is False", refuse_direct=1)


@pytest.mark.parametrize("part", [1000, 4096, 5000])
def test_reads_that_are_cut_short(run, part):
    run(MIXED + "run(2)", part=part)


def test_reads_that_are_interrupted(run):
    run(MIXED + "run(2)", interrupt=1)


def test_devices_with_blocks_larger_than_a_page(run):
    """Memory around a resident weight is not the pager's to write, however large the disk's blocks are."""
    run(MIXED + "run(3)", block=16384)


def test_devices_that_decrypt_a_direct_read_where_it_lies(run):
    """dm-crypt does: pages of a direct read hold ciphertext for a moment. Weights in use must not lie there."""
    if run(MIXED + 'print(run(2)["direct"])', cipher_ms=3) == "False\n":
        pytest.skip("this file system has no direct reads")


def test_a_disk_that_fails_ends_the_pass_with_the_place(run):
    code = """
import errno
for kind in (STREAMED, RESIDENT):
    blocks = [(STREAMED, 0, PAGE), (kind, 8 * PAGE, 3 * PAGE)]
    with Paged(path, blocks, [0, 1], ring=5 * PAGE, chunk=PAGE) as paged:
        try:
            for _ in range(3):
                paged.run_pass()
        except OSError as error:
            assert error.errno == errno.EIO, error
            expected = f"reading bytes {8 * PAGE} to {11 * PAGE} failed (error 5): {path}"
            assert error.strerror == expected, error
        else:
            raise SystemExit("no error")
with Paged(path, [(ROWS, 0, 20 * PAGE)], []) as paged:
    paged.pager.open_rows(0, PAGE, array("i", [3, 7]))
    try:
        paged.pager.open_rows(0, PAGE, array("i", [3, 9]))
    except OSError as error:
        assert error.errno == errno.EIO, error
    else:
        raise SystemExit("no error")
"""
    run(START + code, broken_at=9 * PAGE + 5)


GATED = (
    START
    + """
gate = Path("gate")
gate.touch()
def blocked(call):
    '''The thread that calls, once it must wait: Python goes on meanwhile, or this would not return.'''
    result = []
    def target():
        try:
            result.append(call())
        except OSError as error:
            result.append(error)
    thread = threading.Thread(target=target)
    thread.start()
    for _ in range(50):
        time.sleep(0.002)
        assert thread.is_alive()
    return thread, result
def refuse_close(pager):
    try:
        pager.close()
    except RuntimeError as error:
        assert str(error) == "the pager is in use by 1 calls or hooks", error
    else:
        raise SystemExit("closed under a call")
"""
)


def test_python_runs_while_a_block_is_waited_for(run):
    code = """
with Paged(path, [(STREAMED, 5, 3 * PAGE)], [0], ring=4 * PAGE) as paged:
    thread, result = blocked(lambda: paged.acquire(0))
    refuse_close(paged.pager)
    gate.unlink()
    thread.join()
    assert isinstance(result[0], int), result
    statistics = paged.pager.statistics()
    assert statistics["wait_seconds"] > 0.09 and statistics["waits"] == 1, statistics
    assert statistics["busy_seconds"] >= statistics["wait_seconds"] - 0.05, statistics
"""
    run(GATED + code, gate="gate")


def test_python_runs_while_rows_are_read(run):
    code = """
with Paged(path, [(ROWS, 5, 10 * PAGE)], []) as paged:
    thread, result = blocked(lambda: paged.pager.open_rows(0, PAGE, array("i", [4])))
    refuse_close(paged.pager)
    gate.unlink()
    thread.join()
    assert result == [None] and paged.home(0)[4 * PAGE : 5 * PAGE] == paged.wanted(0)[4 * PAGE : 5 * PAGE]
"""
    run(GATED + code, gate="gate")


def test_an_abort_ends_a_wait_although_the_disk_hangs(run):
    code = """
blocks = [(STREAMED, i * 4 * PAGE + 3, 3 * PAGE) for i in range(4)]
with Paged(path, blocks, range(4), ring=9 * PAGE) as paged:
    for _ in range(3):
        paged.pager.begin_pass()
        thread, result = blocked(lambda: paged.acquire(0))
        start = time.monotonic()
        paged.pager.abort()
        thread.join()
        assert time.monotonic() - start < 0.4 and "the pass was aborted" in str(result[0]), result
        paged.pager.end_pass()
    gate.unlink()
    for _ in range(3):
        paged.run_pass()
        paged.pager.begin_pass()
        paged.acquire(0)
        paged.pager.abort()
        paged.pager.release()
        paged.pager.end_pass()
    paged.run_pass()
    assert paged.pager.statistics()["passes"] == 4
"""
    run(GATED + code, gate="gate")


def test_closing_waits_for_the_reads_under_way(run):
    code = """
paged = Paged(path, [(STREAMED, 5, 3 * PAGE)], [0], ring=4 * PAGE)
while paged.pager.statistics()["busy_seconds"] == 0:  # no thread has begun to read
    time.sleep(0.001)
thread, result = blocked(paged.pager.close)
gate.unlink()
thread.join()
assert result == [None]
assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]
"""
    run(GATED + code, gate="gate")


def test_what_is_asked_for_out_of_order_while_reads_are_under_way(run):
    code = """
blocks = [(STREAMED if i % 2 else RESIDENT, i * 2 * PAGE + 11, 2 * PAGE) for i in range(9)]
for threads in (1, 4):
    with Paged(path, blocks, range(9), ring=8 * PAGE, chunk=PAGE, threads=threads) as paged:
        for order in ([8], [7, 1, 3], [3, 2, 1, 0], range(9), [5, 6], range(9)):
            paged.run_pass(order)
"""
    run(START + code, cipher_ms=2)
