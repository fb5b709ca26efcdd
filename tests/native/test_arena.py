import ctypes
import gc
import re
import sys

import numpy
import pytest
from blocks import PAGE, protection

from edgeinfer import _native


def test_an_arena_is_zeroed_writable_memory_of_exactly_its_size():
    arena = _native.Arena(10_001)
    view = memoryview(arena)
    assert (view.nbytes, view.readonly, view.format) == (10_001, False, "B")
    assert bytes(view) == bytes(10_001)
    view[10_000] = 7
    assert ctypes.string_at(arena.address + 10_000, 1) == b"\7"
    assert arena.address % PAGE == 0


def test_views_keep_the_memory_alive():
    arena = _native.Arena(1 << 20)
    address = arena.address
    array = numpy.frombuffer(arena, dtype=numpy.uint8)[5:10]
    del arena
    gc.collect()
    array[:] = 3
    assert ctypes.string_at(address + 5, 5) == b"\3" * 5
    assert protection(address) == "rw-p"


def test_the_memory_goes_with_the_last_view():
    arena = _native.Arena(64 << 20)
    memoryview(arena).cast("B")[0] = 1
    resident = _resident_kib()
    numpy.frombuffer(arena, dtype=numpy.uint8)[:] = 1
    assert _resident_kib() - resident > 60 << 10
    del arena
    assert _resident_kib() - resident < 4 << 10


@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"expected a positive number of bytes, got {size}"):
        _native.Arena(size)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
def test_sizes_beyond_any_memory(size):
    with pytest.raises(OSError, match="memory could not be reserved"):
        _native.Arena(size)


@pytest.mark.parametrize(
    "size, error", [(2**63, OverflowError), (1.5, TypeError), ("1", TypeError), (None, TypeError)]
)
def test_sizes_that_are_no_sizes(size, error):
    with pytest.raises(error):
        _native.Arena(size)


def test_arenas_hold_one_reference_to_their_type_and_return_it():
    def use() -> None:
        arenas = [_native.Arena(PAGE) for _ in range(10)]
        for size in (2**62, -1):
            with pytest.raises((OSError, ValueError)):
                _native.Arena(size)
        del arenas[3:]

    counts = []
    for _ in range(5):
        use()
        gc.collect()
        counts.append(sys.getrefcount(_native.Arena))
    assert counts[1:] == [counts[1]] * 4


def test_types_cannot_be_derived_from():
    for type_ in (_native.Arena, _native.Pager, _native.Hook):
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Derived", (type_,), {})


def test_guarded_pages_are_untouchable_until_opened():
    arena = _native.Arena(4 * PAGE)
    _native.guard_pages(arena.address + PAGE, 2 * PAGE)
    shown = [protection(arena.address + i * PAGE) for i in range(4)]
    assert shown == ["rw-p", "---p", "---p", "rw-p"]
    _native.open_pages(arena.address + PAGE + 10, 1)
    assert protection(arena.address + PAGE) == "rw-p"
    assert protection(arena.address + 2 * PAGE) == "---p"
    assert ctypes.string_at(arena.address + PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("place, size", [(1, PAGE), (0, PAGE - 1)])
def test_only_whole_pages_are_guarded(place, size):
    arena = _native.Arena(2 * PAGE)
    with pytest.raises(OSError, match="pages could not be guarded"):
        _native.guard_pages(arena.address + place, size)
    assert protection(arena.address) == "rw-p"


@pytest.mark.parametrize("call", ["guard_pages", "open_pages"])
@pytest.mark.parametrize("numbers", [(-PAGE, PAGE), (2**64, PAGE), (0, 2**64 + PAGE)])
def test_addresses_are_not_cut_to_64_bits(call, numbers):
    with pytest.raises(OverflowError):
        getattr(_native, call)(*numbers)


def _resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1])
