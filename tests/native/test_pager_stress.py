"""The pager's threads under the compiler's sanitizers: see stress.c."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from compiler import HERE, build, compiler

NATIVE = HERE.parents[1] / "native"
SECONDS = 3
# They need Python, ggml or a loaded library.
PYTHON_OR_GGML = ("module", "hook", "ggml_view", "intercept")


def check_sanitizer(sanitizer: str, directory: Path) -> None:
    program = directory / "empty.c"
    program.write_text("int main(void) { return 0; }\n")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [*compiler(), f"-fsanitize={sanitizer}", str(program), "-o", str(directory / "empty")]
    if subprocess.run(command, capture_output=True, env=environment).returncode != 0:
        pytest.skip(f"the C compiler has no -fsanitize={sanitizer}")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_passes_in_random_orders_with_aborts(sanitizer, tmp_path):
    check_sanitizer(sanitizer, tmp_path)
    program = build(
        HERE / "stress.c",
        tmp_path / "stress",
        *[str(path) for path in sorted(NATIVE.glob("*.c")) if not path.name.startswith(PYTHON_OR_GGML)],
        f"-I{NATIVE}",
        "-O1",
        "-fno-omit-frame-pointer",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-pthread",
    )
    # Older ThreadSanitizer runtimes do not start where addresses are spread as widely as newer kernels do.
    fixed_addresses = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": ""}
    done = subprocess.run(
        [*fixed_addresses, str(program), str(tmp_path / "weights.bin"), str(SECONDS), str(os.getpid())],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(zip(done.stdout.split()[::2], map(int, done.stdout.split()[1::2])))
    assert counts["passes"] > 10 and counts["acquired"] > 1000, counts
    assert counts["refused"] < 0.8 * counts["rounds"], counts
