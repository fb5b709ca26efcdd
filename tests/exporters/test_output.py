"""Results appear whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeinfer.errors import ExportError
from edgeinfer.exporters.output import Target, TargetGroup


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


KILLED = """
import os, pathlib, signal, sys
from edgeinfer.exporters.output import Target, TargetGroup
path, kind, kill = sys.argv[1:]
with TargetGroup(path) if kind == "group" else Target(path, folder=kind == "folder") as part:
    scratch = part.parent if kind == "file" else part
    (scratch / "floats.gguf").write_bytes(b"large")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if kill == "kill" else sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder", "group"])
def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path, kind):
    path = tmp_path / "out[1].gguf"
    subprocess.run([sys.executable, "-c", KILLED, str(path), kind, "kill"], stdout=subprocess.DEVNULL)
    assert len(list(tmp_path.rglob("floats.gguf"))) == 1
    with Target(tmp_path / "other.gguf") as part:
        part.write_bytes(b"done")
    assert len(list(tmp_path.rglob("floats.gguf"))) == 1
    with Target(path) as part:
        part.write_bytes(b"done")
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["other.gguf", "out[1].gguf"]


def test_what_another_process_is_writing_stays(tmp_path):
    path = tmp_path / "out.gguf"
    command = [sys.executable, "-c", KILLED, str(path), "file", "wait"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"ready\n"
        with Target(path) as part:
            part.write_bytes(b"ours")
        assert len(list(tmp_path.rglob("floats.gguf"))) == 1
        assert b"out.gguf exists already" in other.communicate()[1]
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [Target, TargetGroup])
def test_what_another_run_put_there_meanwhile_is_kept(tmp_path, kind):
    path = tmp_path / "out.onnx"
    with pytest.raises(ExportError, match="out.onnx exists already"):
        with kind(path) as part:
            (part / path.name if kind is TargetGroup else part).write_bytes(b"second")
            path.write_bytes(b"first")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    with kind(path, force=True) as part:
        (part / path.name if kind is TargetGroup else part).write_bytes(b"second")
    assert path.read_bytes() == b"second"


def test_what_was_there_before_a_killed_process_stays(tmp_path):
    aside = tmp_path / ".out.onnx.0123abcd.part" / "replaced"
    aside.mkdir(parents=True)
    (aside / "out.onnx").write_bytes(b"old")
    with Target(tmp_path / "out.onnx") as part:
        part.write_bytes(b"new")
    assert (aside / "out.onnx").read_bytes() == b"old"


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


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="is no file but a device or a pipe"):
        Target(tmp_path / "pipe", force=True)


def _group(path, **options):
    return TargetGroup(path, replaced=[f"{path.name}.data"], others=["tokenizer.json"], **options)


def _contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_that_belong_together_appear_together(tmp_path):
    with _group(tmp_path / "m.onnx") as folder:
        for name in ("m.onnx", "m.onnx.data", "tokenizer.json", "scratch"):
            (folder / name).write_text(name)
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert _contents(tmp_path) == {name: name for name in ("m.onnx", "m.onnx.data", "tokenizer.json")}


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_of_files_that_belong_together_nothing_is_left_behind(tmp_path, stop):
    with pytest.raises(stop):
        with _group(tmp_path / "m.onnx") as folder:
            (folder / "m.onnx.data").write_text("half")
            raise stop
    assert list(tmp_path.iterdir()) == []


def test_replacing_takes_the_old_data_along(tmp_path):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ExportError, match="exists already.*--force"):
        _group(tmp_path / "m.onnx")
    with pytest.raises(ValueError):
        with _group(tmp_path / "m.onnx", force=True) as folder:
            (folder / "m.onnx").write_text("new")
            raise ValueError
    assert _contents(tmp_path) == {"m.onnx": "old", "m.onnx.data": "old"}
    with _group(tmp_path / "m.onnx", force=True) as folder:
        (folder / "m.onnx").write_text("new")
    assert _contents(tmp_path) == {"m.onnx": "new"}


def test_data_of_another_model_is_not_written_over(tmp_path):
    (tmp_path / "m.onnx.data").write_text("another's")
    with pytest.raises(ExportError, match="m.onnx.data exists already"):
        _group(tmp_path / "m.onnx")


def test_the_model_comes_last_and_goes_first(tmp_path, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    seen = []
    rename = os.rename

    def watched(before, after):
        rename(before, after)
        files = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
        seen.append((files.get("m.onnx"), files.get("m.onnx.data")))

    monkeypatch.setattr(os, "rename", watched)
    with _group(tmp_path / "m.onnx", force=True) as folder:
        for name in ("m.onnx", "m.onnx.data"):
            (folder / name).write_text("new")
    assert seen == [(None, "old"), (None, None), (None, "new"), ("new", "new")]


def test_what_was_there_comes_back_where_a_rename_fails(tmp_path, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    rename = os.rename

    def failing(before, after):
        if os.fspath(after) == os.fspath(tmp_path / "m.onnx") and "replaced" not in os.fspath(before):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(before, after)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ExportError, match="could not be put in place"):
        with _group(tmp_path / "m.onnx", force=True) as folder:
            for name in ("m.onnx", "m.onnx.data"):
                (folder / name).write_text("new")
    assert _contents(tmp_path) == {"m.onnx": "old", "m.onnx.data": "old"}


def test_a_tokenizer_is_shared_only_where_it_is_the_same(tmp_path):
    (tmp_path / "tokenizer.json").write_text("one")
    with _group(tmp_path / "a.onnx") as folder:
        (folder / "a.onnx").write_text("a")
        (folder / "tokenizer.json").write_text("one")
    with pytest.raises(ExportError, match="tokenizer.json is there already and belongs to another model"):
        with _group(tmp_path / "b.onnx") as folder:
            (folder / "b.onnx").write_text("b")
            (folder / "tokenizer.json").write_text("two")
    assert _contents(tmp_path) == {"a.onnx": "a", "tokenizer.json": "one"}


def test_no_permission_to_write():
    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which others may not enter
    user = os.geteuid()
    try:
        folder.chmod(0o555)
        if user == 0:  # root may write everywhere: look as nobody
            os.seteuid(65534)
        with pytest.raises(ExportError, match="No permission to write into"):
            Target(folder / "out.gguf")
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)
