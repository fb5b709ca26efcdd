"""Pages that change their address: what they hold goes along, what is left cannot be touched or is empty."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest

_native = pytest.importorskip("edgeinfer._native", reason="needs the C extension")
PAGE = _native.PAGE_BYTES
BYTES = 64 * PAGE


@pytest.fixture
def arenas():
    return _native.Arena(BYTES), _native.Arena(BYTES)


def fill(arena):
    memoryview(arena).cast("B")[:] = bytes(number // PAGE % 251 for number in range(BYTES))


@pytest.mark.parametrize("first, num_pages", [(0, 64), (3, 7), (63, 1)])
def test_pages_keep_their_bytes_there_and_back(arenas, first, num_pages):
    ring, home = arenas
    fill(ring)
    held = memoryview(ring).cast("B")
    expected = bytes(held)
    start, size = first * PAGE, num_pages * PAGE
    for _ in range(3):
        _native.guard_pages(home.address, BYTES)
        _native.move_pages(ring.address + start, home.address, size, False)
        assert ctypes.string_at(home.address, size) == expected[start : start + size]
        assert bytes(held[start : start + size]) == bytes(size)
        assert bytes(held[:start]) + bytes(held[start + size :]) == expected[:start] + expected[start + size :]
        _native.move_pages(home.address, ring.address + start, size, True)
        assert bytes(held) == expected


@pytest.mark.parametrize("arguments", [(1, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE + 1), (0, 0, 0)])
def test_only_whole_pages_are_moved(arenas, arguments):
    ring, home = arenas
    from_offset, to_offset, size = arguments
    with pytest.raises(OSError, match="pages could not be moved"):
        _native.move_pages(ring.address + from_offset, home.address + to_offset, size, False)


def test_what_is_not_mapped_is_an_error(arenas):
    with pytest.raises(OSError, match="pages could not be moved"):
        _native.move_pages(0, arenas[1].address, PAGE, False)


TOUCH_AFTER = """
import ctypes
from edgeinfer import _native
a, b = _native.Arena(1 << 20), _native.Arena(1 << 20)
_native.move_pages(a.address, b.address, 1 << 20, True)
print("moved", flush=True)
ctypes.string_at(a.address, 1)
"""


def test_guarded_pages_stop_the_process():
    # Sanitizers report the fault themselves; either way the process must not go on
    environment = {**os.environ, "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":handle_segv=0"}
    result = subprocess.run([sys.executable, "-c", TOUCH_AFTER], capture_output=True, text=True, env=environment)
    assert result.stdout == "moved\n" and result.returncode == -signal.SIGSEGV
