"""Prepared models on the disk: whole or not there, made once, bounded, not removed while they are used."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

pytest.importorskip("fcntl", reason="needs file locks")

from edgeinfer.errors import EngineError, ModelFileError
from edgeinfer.onnx import cache
from edgeinfer.onnx.identity import content_digest, entry_key

KEY = "0" * 32


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgeinfer" / "onnx"


def fill(size=10_000, content="x"):
    def make(folder):
        (folder / "data").write_bytes(os.urandom(size))
        (folder / cache.MANIFEST).write_text(json.dumps(content))

    return make


def manifest(entry):
    return json.loads((entry.folder / cache.MANIFEST).read_text())


def must_not_be_called(folder):
    raise AssertionError("it is there already")


def test_made_once(folder):
    with_key = cache.find_or_make(KEY, 10_000, fill(content="first"))
    assert with_key.folder == folder / KEY and with_key.nbytes >= 10_000
    again = cache.find_or_make(KEY, 10_000, must_not_be_called)
    assert manifest(again) == "first"
    assert cache.find("1" * 32) is None


def test_an_entry_in_a_folder_that_cannot_be_written_is_used(folder, monkeypatch):
    """As on a read-only disk, and where another user has made it."""

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    cache.find_or_make(KEY, 10_000, fill(content="first")).close()
    monkeypatch.setattr(os, "utime", refuse)
    assert manifest(cache.find_or_make(KEY, 10_000, must_not_be_called)) == "first"


class Stop(BaseException):
    """As Ctrl-C is."""


@pytest.mark.parametrize("error", [EngineError("no"), Stop()])
def test_a_failure_leaves_nothing(folder, error):
    def make(part):
        fill()(part)
        raise error

    with pytest.raises(type(error)):
        cache.find_or_make(KEY, 10_000, make)
    assert not list(folder.iterdir())
    assert cache.find(KEY) is None
    assert manifest(cache.find_or_make(KEY, 10_000, fill(content="later"))) == "later"


CRASH = """
import os, sys
from edgeinfer.onnx import cache
def make(folder):
    (folder / "data").write_bytes(b"half")
    os.kill(os.getpid(), 9)
cache.find_or_make(sys.argv[1], 1000, make)
"""


def test_a_crash_half_way_leaves_no_entry(folder):
    assert subprocess.run([sys.executable, "-c", CRASH, KEY]).returncode == -signal.SIGKILL
    left = [path for path in folder.iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(KEY) and left[0].suffix == ".part"
    assert cache.find(KEY) is None
    entry = cache.find_or_make(KEY, 1000, fill(content="whole"))
    assert manifest(entry) == "whole"
    assert sorted(os.listdir(entry.folder)) == ["data", cache.MANIFEST, cache.SEAL]
    assert os.listdir(folder) == [KEY]


def test_what_still_writes_after_a_crash_does_not_reach_what_is_made_then(folder):
    subprocess.run([sys.executable, "-c", CRASH, KEY], check=False)
    orphan = next(path for path in folder.iterdir() if path.is_dir())

    def make(part):
        fill(content="whole")(part)
        orphan.mkdir(exist_ok=True)  # a child of the killed one comes to its next stage
        (orphan / "data").write_bytes(b"late")

    assert (cache.find_or_make(KEY, 1000, make).folder / "data").stat().st_size == 10_000


@pytest.mark.parametrize("name", ["data", cache.MANIFEST, cache.SEAL])
@pytest.mark.parametrize("how", ["gone", "short", "changed", "longer"])
def test_a_damaged_entry_is_made_again(folder, name, how):
    cache.find_or_make(KEY, 10_000, fill(content="first")).close()
    path = folder / KEY / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        changed = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"short": content[:3], "changed": changed, "longer": content + b"x"}[how])
    assert cache.find(KEY) is None
    entry = cache.find_or_make(KEY, 10_000, fill(content="again"))
    assert manifest(entry) == "again" and cache.find(KEY) is not None


def _make_slowly(key, made, path):
    def make(folder):
        made.put(os.getpid())
        time.sleep(0.3)
        fill()(folder)

    cache.find_or_make(key, 1000, make).close()


def test_two_processes_make_one():
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    processes = [context.Process(target=_make_slowly, args=(KEY, made, None)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    made.get(timeout=1)
    assert made.empty()


def test_old_entries_make_room_for_new_ones(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 130_000)
    keys = [str(number) * 32 for number in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.find_or_make(key, 30_000, fill(30_000)).close()
        os.utime(folder / key / cache.MANIFEST, (1000 + age, 1000 + age))
    cache.find(keys[0]).close()  # used just now: no longer the oldest
    cache.find_or_make(keys[3], 30_000, fill(30_000)).close()
    there = [key for key in keys if cache.find(key) is not None]
    assert keys[1] not in there and keys[0] in there and keys[3] in there
    assert sum(cache.folder_bytes(folder / key) for key in there) <= 130_000


def test_what_is_used_is_not_removed(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 50_000)
    used = cache.find_or_make("1" * 32, 30_000, fill(30_000))
    other = cache.find_or_make("2" * 32, 30_000, fill(30_000))
    assert (used.folder / "data").exists() and not cache.remove(used.folder)
    used.close()
    cache.find_or_make("3" * 32, 30_000, fill(30_000)).close()
    assert not used.folder.exists() and (other.folder / "data").exists()


def test_left_overs_go_unless_somebody_makes_them(folder):
    cache.find_or_make(KEY, 1000, fill()).close()
    for name in ("1" * 32 + ".0123abcd.part", "2" * 32):
        (folder / name).mkdir()
        (folder / name / "data").write_bytes(b"half")
    with cache._making("1" * 32), cache._making("2" * 32):
        cache.make_room(1000)
        assert len([path for path in folder.iterdir() if path.is_dir()]) == 3
    cache.make_room(1000)
    assert os.listdir(folder) == [KEY]


def test_a_full_disk_is_said_before_anything_is_made(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(100 << 30, 99 << 30, 1 << 30))
    with pytest.raises(
        EngineError, match=r"takes about 2.10 GiB in .*, which has 1.00 GiB free. Make room .*XDG_CACHE_HOME"
    ):
        cache.find_or_make(KEY, 2 << 30, must_not_be_called)


def test_a_disk_that_others_fill_meanwhile(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = [1 << 30]
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(100 << 30, 99 << 30, free[0]))

    def make(part):
        free[0] = 1 << 20
        raise ModelFileError("Failed to write external initializers")

    with pytest.raises(EngineError, match=r"became full while .*: 1.00 MiB are free. .*XDG_CACHE_HOME"):
        cache.find_or_make(KEY, 1000, make)
    assert not list(folder.iterdir())


def test_a_cache_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="cannot be prepared in .*XDG_CACHE_HOME"):
        cache.find_or_make(KEY, 1000, must_not_be_called)


def test_the_key_follows_content_not_names(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 100_000)
    other.write_bytes(b"a" * 100_000)
    key = entry_key([one], 1)
    assert entry_key([other], 1) == key and len(key) == 32
    assert entry_key([one], 2) != key and entry_key([one, other], 1) != key
    other.write_bytes(b"a" * 99_999 + b"b")
    assert entry_key([other], 1) != key


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"a" * 100_000)
    first = content_digest(path)
    monkeypatch.setattr("edgeinfer.onnx.identity._digest", lambda _: "read again")
    assert content_digest(path) == first
    path.write_bytes(b"b" * 100_000)
    assert content_digest(path) == "read again"


def test_the_key_follows_onnxruntime_and_processor(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.touch()
    keys = {entry_key([path])}
    monkeypatch.setattr("onnxruntime.__version__", "1.0.0")
    keys.add(entry_key([path]))
    monkeypatch.setattr("edgeinfer.onnx.identity.processor", lambda: "another")
    keys.add(entry_key([path]))
    assert len(keys) == 3
