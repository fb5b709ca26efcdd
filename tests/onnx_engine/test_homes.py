"""Where weights are mapped: told apart although the kernel shows neighbours as one mapping."""

import ctypes
import mmap
import os

import pytest

from edgeinfer.onnx.homes import Mapping, as_made, mappings, without

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED = 0x10


@pytest.fixture
def place(tmp_path):
    """Maps pages of a file at pages of a free part of the address space, as (file page, pages, at page)."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * PAGE))
    handle = os.open(path, os.O_RDONLY)
    room = LIBC.mmap(None, 128 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)

    def map_pages(first, pages, at):
        flags = mmap.MAP_PRIVATE | MAP_FIXED
        found = LIBC.mmap(room + at * PAGE, pages * PAGE, mmap.PROT_READ, flags, handle, first * PAGE)
        assert found == room + at * PAGE
        return Mapping(found, first * PAGE, pages * PAGE)

    yield path, map_pages
    LIBC.munmap(room, 128 * PAGE)
    os.close(handle)


def ranges(*pages):
    return [(first * PAGE, count * PAGE) for first, count in pages]


def test_neighbours_in_memory_and_file_are_shown_as_one_and_told_apart(place):
    path, map_pages = place
    behind = map_pages(10, 5, at=20)
    one, other = map_pages(0, 4, at=0), map_pages(4, 6, at=4)
    assert len(mappings(path)) == 2  # or this tests nothing
    assert as_made(mappings(path), ranges((10, 5), (0, 4), (4, 6))) == [one, other, behind]


def test_mappings_that_share_a_page(place):
    path, map_pages = place
    made = [map_pages(0, 4, at=0), map_pages(3, 4, at=10), map_pages(3, 5, at=20), map_pages(8, 2, at=25)]
    assert len(mappings(path)) == 3
    assert as_made(mappings(path), ranges((0, 4), (3, 4), (3, 5), (8, 2), (0, 8))) == made


def test_what_the_ranges_do_not_explain_stays_whole(place):
    path, map_pages = place
    made = map_pages(0, 9, at=0)
    assert as_made(mappings(path), ranges((0, 4), (4, 6))) == [made]


def test_those_of_an_earlier_session_are_left_out(place):
    path, map_pages = place
    map_pages(0, 4, at=4)
    before = mappings(path)
    new = [map_pages(4, 3, at=8), map_pages(0, 2, at=40)]
    assert len(mappings(path)) == 2
    assert without(mappings(path), before) == new
    middle = Mapping(new[0].address + PAGE, 5 * PAGE, PAGE)
    parts = [Mapping(new[0].address + shift * PAGE, (4 + shift) * PAGE, PAGE) for shift in (0, 2)]
    assert without(new[:1], [middle]) == parts
