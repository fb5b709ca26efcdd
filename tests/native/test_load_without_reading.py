"""A library maps files, as llama.cpp does: its mmap is replaced for the time of a load, on one thread."""

import ctypes
import threading
from pathlib import Path

import pytest
from blocks import PAGE, protection, write_random
from compiler import build_library

from edgeinfer import _native

MAPPER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
void *map_part(const char *path, size_t bytes, long offset)
{
    int fd = open(path, O_RDONLY);
    void *address = mmap(NULL, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, offset);
    close(fd);
    return address == MAP_FAILED ? NULL : address;
}
void *map_file(const char *path, size_t bytes) { return map_part(path, bytes, 0); }
void *map_memory(size_t bytes)
{
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
int unmap(void *address, size_t bytes) { return munmap(address, bytes); }
"""
LINKS = {
    "lazy": [],
    "read-only": ["-Wl,-z,relro,-z,now"],
    "no table of jumps": ["-fno-plt", "-Wl,-z,relro,-z,now"],
}


class Library:
    def __init__(self, path, file):
        self.name, self.file = str(path), file
        self.data = write_random(file, 5 * PAGE + 77)
        library = ctypes.CDLL(self.name)
        for function in (library.map_file, library.map_part, library.map_memory):
            function.restype = ctypes.c_void_p
        library.map_part.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_long]
        library.map_memory.argtypes = [ctypes.c_size_t]
        library.unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library = library

    def map(self, size: int | None = None, offset: int = 0) -> int:
        return self._library.map_part(
            str(self.file).encode(), len(self.data) if size is None else size, offset
        )

    def map_memory(self) -> int:
        return self._library.map_memory(PAGE)

    def unmap(self, address: int, size: int | None = None) -> None:
        assert self._library.unmap(address, len(self.data) if size is None else size) == 0

    def files(self) -> list[tuple[int, int, int]]:
        about = self.file.stat()
        return [(about.st_dev, about.st_ino, about.st_size)]

    def content(self, address: int) -> bytes:
        return ctypes.string_at(address, len(self.data))

    def maps_for_real(self) -> bool:
        address = self.map()
        real = self.content(address) == self.data
        self.unmap(address)
        return real


@pytest.fixture(scope="module", params=LINKS)
def built(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mapper")
    return build_library(
        MAPPER, directory / f"libmapper{list(LINKS).index(request.param)}.so", *LINKS[request.param]
    )


@pytest.fixture
def library(built, tmp_path):
    return Library(built, tmp_path / "weights.bin")


def test_the_file_is_not_mapped_but_its_address_space_is_there(library):
    address, addresses = _native.load_without_reading(library.name, library.files(), library.map)
    assert addresses == [address]
    assert library.content(address) == bytes(len(library.data))
    assert protection(address) == "r--p"
    maps = Path("/proc/self/maps").read_text().splitlines()
    shown = [line for line in maps if line.startswith(f"{address:x}-")]
    assert shown[0].split()[4] == "0"  # of no file
    library.unmap(address)
    # Another thread of the process may have taken the addresses meanwhile: the reservation is gone, that is all.
    assert "r--p" not in (protection(address), protection(address + 5 * PAGE))
    assert library.maps_for_real()


def test_other_mappings_of_the_library_are_left_alone(library, tmp_path):
    def load() -> list[int]:
        memory = library.map_memory()
        ctypes.memset(memory, 7, PAGE)
        return [memory, library.map(PAGE), library.map(PAGE, offset=PAGE), library.map(), library.map()]

    places, addresses = _native.load_without_reading(library.name, library.files(), load)
    memory, part, second, whole, again = places
    assert addresses == [whole]
    assert ctypes.string_at(memory, PAGE) == b"\7" * PAGE
    assert ctypes.string_at(part, PAGE) == library.data[:PAGE]
    assert ctypes.string_at(second, PAGE) == library.data[PAGE : 2 * PAGE]
    assert library.content(again) == library.data
    for place in (memory, part, second):
        library.unmap(place, PAGE)
    library.unmap(whole)
    library.unmap(again)


def test_files_that_were_not_mapped_have_no_address(library):
    device, inode, size = library.files()[0]
    others = [(device, inode, size + 1), (device, inode + 1, size), (device + 1, inode, size)]
    address, addresses = _native.load_without_reading(library.name, others, library.map)
    assert addresses == [None] * 3
    assert library.content(address) == library.data
    library.unmap(address)
    assert _native.load_without_reading(library.name, [], lambda: "result") == ("result", [])


def test_an_error_puts_the_import_back(library):
    def load() -> None:
        library.unmap(library.map())
        raise LookupError("inside")

    for _ in range(3):
        with pytest.raises(LookupError, match="inside"):
            _native.load_without_reading(library.name, library.files(), load)
        assert library.maps_for_real()


def test_a_load_within_a_load_is_the_stock_one(library):
    def inner() -> int:
        return library.map()  # gets the outer one's address space

    def outer() -> int:
        address, addresses = _native.load_without_reading(library.name, library.files(), inner)
        assert addresses == [None]
        with pytest.raises(ZeroDivisionError):
            _native.load_without_reading(library.name, library.files(), lambda: 1 // 0)
        return address

    address, addresses = _native.load_without_reading(library.name, library.files(), outer)
    assert addresses == [address]
    library.unmap(address)
    assert library.maps_for_real()


@pytest.mark.parametrize("name", ["libnone.so", "", "libm.so.6", "x" * 5000])
def test_a_library_without_that_import_falls_back(library, name):
    address, addresses = _native.load_without_reading(name, library.files(), library.map)
    assert addresses == [None]
    assert library.content(address) == library.data
    library.unmap(address)


def test_other_threads_map_for_real_meanwhile(library):
    def load() -> int:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(library.maps_for_real()))
        thread.start()
        thread.join()
        assert seen == [True]
        return library.map()

    address, addresses = _native.load_without_reading(library.name, library.files(), load)
    assert addresses == [address]
    library.unmap(address)


def test_a_second_load_waits_for_the_first(library):
    inside, leave, order = threading.Event(), threading.Event(), []

    def load(name: str) -> int:
        order.append(name)
        if name == "first":
            inside.set()
            leave.wait(10)
            order.append("first done")
        return library.map()

    def run(name: str) -> None:
        address, addresses = _native.load_without_reading(library.name, library.files(), lambda: load(name))
        assert addresses == [address]
        library.unmap(address)
        order.append("end")

    threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # it waits, without the GIL
    assert threads[1].is_alive()
    leave.set()
    for thread in threads:
        thread.join()
    assert order.index("first done") < order.index("second") and order.count("end") == 2
    assert library.maps_for_real()


@pytest.mark.parametrize(
    "files, error, message",
    [
        ([7], TypeError, r"expected a tuple \(device, inode, bytes\), got int"),
        ([(1, 2)], TypeError, "3 arguments"),
        ([(2**64, 2, 3)], OverflowError, "too (big|large)"),
        (5, TypeError, "has no len"),
    ],
)
def test_files_that_are_none(library, files, error, message):
    with pytest.raises(error, match=message):
        _native.load_without_reading(library.name, files, library.map)
    assert library.maps_for_real()
