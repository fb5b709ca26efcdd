"""SIGTERM and SIGHUP end commands that write as Ctrl-C does: nothing half-written is left."""

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from tiny_checkpoints import add_tokenizer, tiny_checkpoint  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no such signals")

#: Runs a command that gets the signal when it has written something.
SCRIPT = """
import os, sys
from edgeinfer.exporters.aligned_file import TargetFile
write, number = TargetFile.write, int(sys.argv.pop(1))
def written(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), number)
TargetFile.write = written
from edgeinfer.cli import main
main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint folder, and the same as GGUF."""
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint(folder / "checkpoint", "llama")
    add_tokenizer(folder / "checkpoint")
    command = [sys.executable, "-m", "edgeinfer", "export", folder / "checkpoint", "-o", folder / "a.gguf"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {"export": folder / "checkpoint", "layout": folder / "a.gguf"}


def _signalled(number, command, source, target, *more, **options):
    line = [sys.executable, "-c", SCRIPT, str(int(number)), command, str(source), "-o", str(target), *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("command", ["export", "layout"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_behind(models, tmp_path, command, number):
    done = _signalled(number, command, models[command], tmp_path / "out.gguf")
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(models, tmp_path):
    (tmp_path / "out.gguf").write_bytes(models["layout"].read_bytes())
    done = _signalled(signal.SIGTERM, "layout", tmp_path / "out.gguf", tmp_path / "out.gguf", "--force")
    assert done.returncode == 128 + signal.SIGTERM
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [models["layout"].read_bytes()]


def test_a_signal_that_is_ignored_stays_so(models, tmp_path):
    """nohup starts programs so."""
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    done = _signalled(signal.SIGHUP, "export", models["export"], tmp_path / "out.gguf", **ignored)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["out.gguf"]
