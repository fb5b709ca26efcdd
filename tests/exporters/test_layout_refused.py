"""What `edgeinfer layout` does with bad input, with disks that fill up, and with files that change meanwhile."""

import os
import subprocess
import sys
from types import SimpleNamespace

import gguf_bytes
import pytest
from tiny import tiny_model

from edgeinfer.errors import ExportError, ModelFileError
from edgeinfer.exporters import layout as layout_module
from edgeinfer.exporters.layout import lay_out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def test_existing_target(models, tmp_path):
    source, result = tiny_model(models, "llama", "Q4_0"), tmp_path / "out.gguf"
    result.write_text("precious")
    with pytest.raises(ExportError, match="exists already.*--force"):
        lay_out(source, result)
    assert result.read_text() == "precious"
    lay_out(source, result, force=True)
    assert gguf_bytes.stock_accepts(result)


def test_a_model_may_be_replaced_by_itself(models, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_model(models, "deepseek2", "Q4_0").read_bytes())
    lay_out(model, tmp_path / "elsewhere.gguf")
    lay_out(model, model, force=True)
    assert model.read_bytes() == (tmp_path / "elsewhere.gguf").read_bytes()


def test_no_room_on_the_disk(models, tmp_path, monkeypatch):
    monkeypatch.setattr(layout_module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=500))
    with pytest.raises(ExportError, match=r"would take 1\...? MiB, but the disk has 500 B free"):
        lay_out(tiny_model(models, "llama", "Q4_0"), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(models, tmp_path):
    """The limit of the size of a file stands for the disk: what was written is gone afterwards."""
    script = (
        "import resource, signal, sys; from edgeinfer.exporters.layout import lay_out\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "lay_out(*sys.argv[1:])"
    )
    source, result = tiny_model(models, "llama", "Q4_0"), tmp_path / "out.gguf"
    child = subprocess.run(
        [sys.executable, "-c", script, source, result], capture_output=True, text=True, check=False
    )
    assert "ExportError: The disk is full" in child.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["shorter", "written to"])
def test_a_source_that_changes_meanwhile(models, tmp_path, change):
    source = tmp_path / "in.gguf"
    source.write_bytes(tiny_model(models, "llama", "Q4_0").read_bytes())

    def interfere(_fraction):
        if change == "shorter":
            os.truncate(source, 100_000)
        else:
            os.utime(source, (0, 0))

    with pytest.raises(ModelFileError, match="became shorter|was changed"):
        lay_out(source, tmp_path / "out.gguf", progress=interfere)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_damaged_source(tmp_path):
    (tmp_path / "in.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelFileError, match="is not a GGUF model"):
        lay_out(tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]
