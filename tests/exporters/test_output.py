"""Results appear whole or not at all."""

import errno
import os

import pytest

from edgeinfer.errors import ExportError
from edgeinfer.exporters.output import Target


def test_a_file_appears_when_it_is_done(tmp_path):
    with Target(tmp_path / "out.gguf") as part:
        part.write_bytes(b"done")
        assert not (tmp_path / "out.gguf").exists()
    assert (tmp_path / "out.gguf").read_bytes() == b"done"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_behind(tmp_path, stop, folder):
    with pytest.raises(stop):
        with Target(tmp_path / "out", folder=folder) as part:
            (part / "some" if folder else part).write_bytes(b"half")
            raise stop
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained(tmp_path):
    with pytest.raises(ExportError, match="The disk is full"):
        with Target(tmp_path / "out.gguf") as part:
            part.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists_is_kept(tmp_path):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match="exists already.*--force"):
        Target(path)
    with pytest.raises(ValueError):
        with Target(path, force=True) as part:
            part.write_bytes(b"half")
            raise ValueError
    assert path.read_bytes() == b"old"
    with Target(path, force=True) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"")
    with Target(tmp_path / "out", force=True, folder=True) as part:
        (part / "new").write_bytes(b"")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_folder_and_the_wrong_kind(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        Target(tmp_path / "none" / "out.gguf")
    with pytest.raises(ExportError, match="a folder is there"):
        Target(tmp_path, force=True)
