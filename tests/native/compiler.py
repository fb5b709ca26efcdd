"""Small C programs and libraries, built with the compiler of the environment."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compiler() -> list[str]:
    """The command of the C compiler ($CC, else cc); skips the test where there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C compiler: {command[0]} was not found")
    return command


def build(source: Path | str, to: Path, *flags: str) -> Path:
    """Compiles the C file or text `source` to the file `to`."""
    if isinstance(source, str):
        text, source = source, to.with_suffix(".c")
        source.write_text(text)
    arguments = [*compiler(), "-std=c11", "-g", "-Wall", "-Wextra", "-o", str(to), str(source), *flags]
    # The sanitizer runtimes that are preloaded for the tests are not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return to


def build_library(source: Path | str, to: Path, *flags: str) -> Path:
    return build(source, to, "-shared", "-fPIC", *flags)


def run_shimmed(shim: Path, directory: Path, code: str, **settings: object) -> str:
    """What `code` prints in a process of its own, with the shim and its settings (SHIM_* in shim.c)."""
    script = directory / "script.py"
    script.write_text(code)
    preload = [*os.environ.get("LD_PRELOAD", "").split(), str(shim)]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": os.pathsep.join(paths),
        **{f"SHIM_{name.upper()}": str(value) for name, value in settings.items()},
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
