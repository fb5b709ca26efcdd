"""Measurements of the machine: sane, kept, made again on request."""

import json
import os

import pytest

from edgeinfer import storage
from edgeinfer.remembered import cache_folder, remembered

pytest.importorskip("edgeinfer._native", reason="needs the C extension")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeinfer" / "measured.json"


def test_a_disk_is_measured_once_and_again_on_request(tmp_path, cache):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(9 << 20))
    first = storage.disk_bytes_per_second(path)
    assert 1e6 < first < 1e12
    kept = json.loads(cache.read_text())
    assert kept == {f"disk {path.stat().st_dev}": first}
    assert storage.disk_bytes_per_second(path) == first
    storage.disk_bytes_per_second(path, again=True)
    assert json.loads(cache.read_text()) != kept


@pytest.mark.parametrize("size", [1, 5000, (4 << 20) + 1])
def test_files_of_any_size_can_be_measured(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert storage.measure(path, seconds=0.01) > 0


def test_a_damaged_or_unwritable_cache_only_costs_the_measurement(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("{damaged")
    assert remembered("key", lambda: 1) == 1
    assert remembered("key", lambda: 2) == 1
    cache.unlink()
    cache.mkdir()
    assert remembered("key", lambda: 3) == 3
    assert remembered("key", lambda: 4) == 4
    assert not [path for path in cache_folder().iterdir() if path != cache]


def test_a_value_of_another_kind_is_measured_again(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text('{"speed": "fast", "ways": [1]}')
    assert remembered("speed", lambda: 2.5, kind=float) == 2.5
    assert remembered("ways", lambda: {"a": True}, kind=dict) == {"a": True}
    assert json.loads(cache.read_text()) == {"speed": 2.5, "ways": {"a": True}}


def test_a_user_without_a_home_folder_measures_each_time(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert [remembered("key", lambda: number) for number in (1, 2)] == [1, 2]


def test_a_relative_cache_folder_is_not_used(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder().is_absolute()
