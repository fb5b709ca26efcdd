"""C programs over the native sources, built and run under the compiler's sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from compiler import HERE, build, compiler

NATIVE = HERE.parents[1] / "native"
SANITIZERS = ["thread", "address,undefined"]
# How long each of them runs; a longer run finds rarer races.
SECONDS = float(os.environ.get("EDGEINFER_STRESS_SECONDS", "4"))
# They need Python, ggml or a loaded library.
PYTHON_OR_GGML = ("module", "hook", "ggml_view", "intercept")


def check_sanitizer(sanitizer: str, directory: Path) -> None:
    program = directory / "empty.c"
    program.write_text("int main(void) { return 0; }\n")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [*compiler(), f"-fsanitize={sanitizer}", str(program), "-o", str(directory / "empty")]
    if subprocess.run(command, capture_output=True, env=environment).returncode != 0:
        pytest.skip(f"the C compiler has no -fsanitize={sanitizer}")


def run_sanitized(name: str, sanitizer: str, directory: Path) -> dict[str, int]:
    """What the program `name`, which takes a file, seconds and a seed, counted."""
    check_sanitizer(sanitizer, directory)
    program = build(
        HERE / f"{name}.c",
        directory / name,
        *[str(path) for path in sorted(NATIVE.glob("*.c")) if not path.name.startswith(PYTHON_OR_GGML)],
        f"-I{NATIVE}",
        "-O1",
        "-fno-omit-frame-pointer",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-pthread",
        "-lm",
    )
    # Older ThreadSanitizer runtimes do not start where addresses are spread as widely as newer kernels do.
    fixed_addresses = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": ""}
    seed = str(os.getpid())
    done = subprocess.run(
        [*fixed_addresses, str(program), str(directory / "weights.bin"), str(SECONDS), seed],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    return dict(zip(done.stdout.split()[::2], map(int, done.stdout.split()[1::2])))
