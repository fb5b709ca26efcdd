"""What a pager refuses, and with which words; how a pass is stopped; how files that change are noticed."""

import errno
import os
import re
import time
from array import array
from pathlib import Path

import pytest
from blocks import PAGE, RESIDENT, ROWS, STREAMED, Paged, write_random

from edgeinfer import _native


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.bin"
    write_random(path, 40 * PAGE + 1234)
    return path


def make(path, blocks=(), order=(), ring=None, chunk=PAGE, threads=1, sources=None):
    return _native.Pager(sources or [(str(path), True)], list(blocks), list(order), ring, chunk, threads)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.bin"))):
        make(tmp_path / "none.bin")


def test_a_directory(tmp_path):
    with pytest.raises(IsADirectoryError):
        make(tmp_path)


def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(OSError) as caught:
        make(tmp_path / "pipe.bin")
    assert caught.value.errno == errno.EINVAL


SIZE = 40 * PAGE + 1234


@pytest.mark.parametrize(
    "block, message",
    [
        ((0, STREAMED, SIZE - 9, 10, 0), "block 1 is empty or does not lie inside its file"),
        ((0, STREAMED, SIZE, 1, 0), "block 1 is empty or does not lie inside its file"),
        ((0, STREAMED, 2**64 - 1, 2, 0), "block 1 is empty or does not lie inside its file"),
        ((0, STREAMED, 1, 2**64 - 1, 0), "block 1 is empty or does not lie inside its file"),
        ((0, STREAMED, 0, 0, 0), "block 1 is empty or does not lie inside its file"),
        ((0, STREAMED, 1, 4 * PAGE, 0), "block 1 does not fit into the ring"),
        ((1, STREAMED, 0, 1, 0), "block 1 is of a source that was not given"),
        ((0, 3, 0, 1, 0), "block 1 is of an unknown kind"),
        ((0, RESIDENT, 0, 1, 0), "block 1 has a home that is not at its place in a page"),
        ((0, RESIDENT, 0, 1, 10 * PAGE + 1), "block 1 has a home that is not at its place in a page"),
        ((0, ROWS, 5, 1, 10 * PAGE), "block 1 has a home that is not at its place in a page"),
    ],
)
def test_blocks_that_cannot_be(path, block, message):
    with pytest.raises(OSError, match=message):
        make(path, [(0, STREAMED, 0, 1, 0), block], [0, 1], _native.Arena(4 * PAGE))


def test_an_order_of_blocks_that_are_not_there(path):
    blocks = [(0, STREAMED, 0, 1, 0), (0, ROWS, 0, 100, 16 * PAGE)]
    for order in ([0, 2], [0, 1]):
        with pytest.raises(
            OSError, match="use 1 of the order is of a block that was not given, or that is read by rows"
        ):
            make(path, blocks, order, _native.Arena(4 * PAGE))


@pytest.mark.parametrize(
    "block",
    [
        (2**32, STREAMED, 0, 1, 0),
        (0, 2**32 + STREAMED, 0, 1, 0),
        (0, STREAMED, 2**64, 1, 0),
        (0, STREAMED, 0, 2**64 + 1, 0),
        (0, STREAMED, -1, 1, 0),
        (-1, STREAMED, 0, 1, 0),
        (0, RESIDENT, 0, 1, 2**64 + PAGE),
    ],
)
def test_numbers_are_not_cut(path, block):
    with pytest.raises(OverflowError):
        make(path, [block], [0], _native.Arena(4 * PAGE))


@pytest.mark.parametrize("number", [2**32, 2**64, -1])
def test_block_numbers_are_not_cut(path, number):
    ring = _native.Arena(4 * PAGE)
    with pytest.raises(OverflowError):
        make(path, [(0, STREAMED, 0, 1, 0)], [number], ring)
    pager = make(path, [(0, STREAMED, 0, 1, 0), (0, ROWS, 0, PAGE, ring.address)], [0], ring)
    for call in (pager.acquire, pager.close_rows, lambda block: pager.open_rows(block, 1, b"")):
        with pytest.raises(OverflowError):
            call(number)
    with pytest.raises(IndexError, match="expected a block below 2, got 2"):
        pager.acquire(2)
    pager.acquire(0)  # none of this is a failure of the pager


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sources": ["x"]}, r"expected a tuple \(path, direct\), got str"),
        ({"blocks": [7]}, r"expected a tuple \(source, kind, offset, bytes, home\), got int"),
        ({"ring": b"x"}, "expected ring to be an Arena or None, got bytes"),
        ({"order": ["x"]}, "'str' object cannot be interpreted as an integer"),
    ],
)
def test_arguments_of_other_types(path, arguments, message):
    with pytest.raises(TypeError, match=message):
        make(path, **arguments)


@pytest.mark.parametrize("chunk, threads", [(0, 1), (-1, 1), (PAGE, 0), (PAGE, 257), (PAGE, -1)])
def test_chunks_and_threads_that_cannot_be(path, chunk, threads):
    with pytest.raises(
        ValueError, match=f"expected chunk_bytes > 0 and 1 to 256 threads, got {chunk} and {threads}"
    ):
        make(path, chunk=chunk, threads=threads)


def test_refusals_leave_no_descriptor_open(path, tmp_path):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for sources, blocks, order in (
        ([(str(path), True), (str(tmp_path / "none"), True)], [], []),
        ([(str(path), True), 5], [], []),
        ([(str(path), True)], [(0, 9, 0, 0, 0)], []),
        ([(str(path), True)], [5], []),
        ([(str(path), True)], [], ["x"]),
        ([(str(path), True)], [], [1]),
    ):
        with pytest.raises((OSError, TypeError)):
            _native.Pager(sources, blocks, order, None)
    assert descriptors() == before


def test_a_block_that_is_not_in_the_order(path):
    for order in ([0, 0], []):
        with Paged(path, [(STREAMED, 0, 1), (STREAMED, 0, 2)], order, ring=PAGE) as paged:
            with pytest.raises(OSError, match="a block was asked for that is not in the order of use"):
                paged.acquire(1)
            with pytest.raises(OSError, match="not in the order of use"):  # failures stay
                paged.pager.begin_pass()


@pytest.mark.parametrize("row", [10, -1, 2**31 - 1, -(2**31)])
def test_rows_out_of_range(path, row):
    with Paged(path, [(ROWS, 0, 10 * 64 + 63)], []) as paged:
        message = re.escape(f"expected rows below 10, got row {row}: {path}")
        with pytest.raises(OSError, match=message):
            paged.pager.open_rows(0, 64, array("i", [1, row, 3]))
        with pytest.raises(OSError, match=message):
            paged.pager.end_pass()


@pytest.mark.parametrize(
    "block, row_bytes, rows", [(0, 64, b""), (2, 64, b""), (1, 0, b""), (1, -1, b""), (1, 64, b"123")]
)
def test_rows_of_what_is_no_table(path, block, row_bytes, rows):
    with Paged(path, [(STREAMED, 0, 9), (ROWS, 0, PAGE)], [0], ring=PAGE) as paged:
        with pytest.raises(ValueError, match=f"got block {block}, {row_bytes} and {len(rows)} bytes"):
            paged.pager.open_rows(block, row_bytes, rows)
        if block != 1:
            with pytest.raises(ValueError, match=f"block {block} is not a table of rows"):
                paged.pager.close_rows(block)
        paged.run_pass([0])  # none of this is a failure of the pager


def change(path: Path, how: str) -> None:
    time.sleep(0.02)  # the clock of file times may be as coarse as 10 ms
    if how == "overwritten":
        with path.open("r+b") as file:
            file.write(b"new")
    elif how == "touched":
        os.utime(path)
    elif how == "truncated":
        os.truncate(path, PAGE)
    elif how == "grown":
        os.truncate(path, 99 * PAGE)
    elif how == "removed":
        path.unlink()
    elif how == "replaced":
        other = path.with_name("other.bin")
        other.write_bytes(path.read_bytes())
        other.replace(path)


@pytest.mark.parametrize("how", ["overwritten", "touched", "truncated", "grown", "removed", "replaced"])
def test_a_file_that_changes_ends_the_run(path, how):
    message = re.escape(f"changed, replaced or removed while in use: {path}")
    with Paged(path, [(STREAMED, 0, 9), (STREAMED, PAGE, 9)], [0, 1], ring=2 * PAGE) as paged:
        paged.run_pass()
        paged.pager.begin_pass()
        paged.pager.acquire(0)
        change(path, how)
        with pytest.raises(OSError, match=message) as caught:
            paged.pager.end_pass()
        assert caught.value.errno == errno.ESTALE
        for call in (paged.pager.begin_pass, paged.pager.end_pass, lambda: paged.pager.acquire(1)):
            with pytest.raises(OSError, match=message):
                call()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("kind", [STREAMED, RESIDENT])
def test_a_file_that_ends_before_the_block(path, kind, direct):
    blocks = [(STREAMED, 0, 4 * PAGE), (kind, 30 * PAGE, 5), (STREAMED, PAGE, 9)]
    with Paged(path, blocks, [0, 2, 1], ring=4 * PAGE, direct=direct) as paged:
        paged.acquire(0)  # fills the ring, so that nothing more is read before it is given back
        os.truncate(path, 20 * PAGE)
        paged.pager.release()
        expected = f"expected bytes {30 * PAGE} to {30 * PAGE + 5}, the file ends before: {path}"
        with pytest.raises(OSError, match=re.escape(expected)) as caught:
            paged.pager.acquire(1)
        assert caught.value.errno == errno.ENODATA


def test_rows_of_a_file_that_ends_before_them(path):
    with Paged(path, [(ROWS, 0, 30 * PAGE)], []) as paged:
        os.truncate(path, 20 * PAGE)
        with pytest.raises(OSError, match="the file ends before"):
            paged.pager.open_rows(0, PAGE, array("i", [3, 25]))


def test_an_aborted_pass_fails_until_the_next_begins(path):
    blocks = [(STREAMED, i * 3 * PAGE, PAGE) for i in range(4)]
    with Paged(path, blocks, range(4), ring=2 * PAGE) as paged:
        for stop in (0, 1, 2, 3, 4):
            paged.pager.begin_pass()
            for number in range(stop):
                paged.acquire(number)
                paged.pager.release()
            paged.pager.abort()
            with pytest.raises(OSError, match="the pass was aborted") as caught:
                paged.pager.acquire(stop % 4)
            assert caught.value.errno == errno.ECANCELED
            paged.pager.end_pass()
            paged.run_pass()
        assert paged.pager.statistics()["passes"] == 5


def test_a_closed_pager(path):
    paged = Paged(path, [(STREAMED, 0, 1), (ROWS, 0, 9)], [0], ring=PAGE)
    pager = paged.pager
    pager.close()
    pager.close()
    calls = {"acquire": (0,), "open_rows": (1, 1, b""), "close_rows": (1,)}
    calls |= dict.fromkeys(("begin_pass", "end_pass", "release", "abort", "statistics"), ())
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match="the pager is closed"):
            getattr(pager, name)(*arguments)
