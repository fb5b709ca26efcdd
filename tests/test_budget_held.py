"""The budget in a real memory cgroup: the command, 600 MB of weights and a vocabulary of 128,000 tokens."""

import json
import re
import subprocess
import sys

import pytest
import tiny  # noqa: F401  (puts benchmarks/ on the path)
from streaming import stock_context, stock_greedy

from benchmarks.cgroup import CgroupError, MemoryCgroup
from benchmarks.maker import make_model
from edgeinfer.modelfile import read_model_file

PROMPT = "Once upon a time"
CONTEXT = 512
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("budget") / "model.gguf"
    make_model(path, "llama", "Q4_0", size=620_000_000, vocabulary=128_000)
    assert path.stat().st_size > 600_000_000
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def answer(model):
    """Stock llama.cpp's greedy tokens."""
    options = {"context_length": CONTEXT, "ubatch": 512, "threads": 2}
    with stock_context(model, **options) as context:
        prompt = context.model.tokenize(PROMPT, True, True)
    return stock_greedy(model, prompt, 12, **options)


def command(model, memory, tokens=12, context=CONTEXT):
    options = {
        "-p": PROMPT,
        "-n": tokens,
        "--temperature": 0,
        "--ctx": context,
        "--threads": 2,
        "--memory": memory,
    }
    values = [str(value) for option in options.items() for value in option]
    return [sys.executable, "-m", "edgeinfer", "run", str(model), *values]


def refusal(model, memory, **options):
    result = subprocess.run(command(model, memory, **options), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert "Traceback" not in result.stderr
    return next(line for line in result.stderr.splitlines() if line.startswith("Error: "))


@pytest.fixture(scope="module")
def smallest(model):
    """Bytes of the smallest budget that works, as the refusal of a smaller one names it."""
    return int(re.search(r"the smallest that works is .* \((\d+) bytes\)", refusal(model, "1MiB"))[1])


@pytest.fixture
def in_cgroup():
    """Runs a command in a cgroup of so many bytes; nothing in it may be killed."""

    def run(limit_bytes, arguments, **options):
        try:
            cgroup = MemoryCgroup(limit_bytes)
        except CgroupError as error:
            pytest.skip(f"no memory cgroup can be made here: {error}")
        with cgroup:
            result = cgroup.run(arguments, capture_output=True, timeout=100, **options)
            assert cgroup.oom_kills == 0
        return result

    return run


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_budget_is_held_in_a_cgroup_of_its_size(model, answer, in_cgroup, share):
    budget = int(model.stat().st_size * share)
    result = in_cgroup(budget, [*command(model, budget), "--json"])
    assert result.returncode == 0, result.stderr.decode()
    numbers = json.loads(result.stdout)
    assert numbers["mode"] == "streaming" and numbers["tokens"] == answer
    assert numbers["budget_bytes"] == budget
    assert numbers["peak_memory_bytes"] <= budget
    products = [tensor for tensor in read_model_file(model).tensors if tensor.name != "token_embd.weight"]
    used = numbers["resident_bytes"] + numbers["streamed_bytes_per_token"]
    assert used >= 0.98 * sum(tensor.nbytes for tensor in products)


def test_smallest_budget_works_and_a_smaller_one_is_refused(model, answer, in_cgroup, smallest):
    result = in_cgroup(smallest, [*command(model, smallest), "--json"])
    assert result.returncode == 0, result.stderr.decode()
    numbers = json.loads(result.stdout)
    assert numbers["tokens"] == answer and numbers["peak_memory_bytes"] <= smallest
    named = re.search(r"the smallest that works is .* \((\d+) bytes\)", refusal(model, smallest - 4 * MIB))
    assert abs(int(named[1]) - smallest) < 3 * MIB  # Python's own memory differs a little from run to run


COUNT_FAULTS = """
import json, resource, sys
import edgeinfer

path, memory, context, prompt = sys.argv[1:]
faults = []
with edgeinfer.load(path, memory=int(memory), ctx=int(context), threads=2) as model:
    for piece in model.generate(prompt, max_tokens=20, temperature=0):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
    print(json.dumps({"mode": model.mode, "faults": faults}))
"""


def test_no_page_is_read_by_faults_once_running(model, in_cgroup):
    budget = int(model.stat().st_size * 0.65)
    script = [sys.executable, "-c", COUNT_FAULTS, str(model), str(budget), str(CONTEXT), PROMPT]
    result = in_cgroup(budget, script)
    assert result.returncode == 0, result.stderr.decode()
    told = json.loads(result.stdout)
    faults = told["faults"]
    assert told["mode"] == "streaming" and len(faults) >= 10
    assert (faults[-1] - faults[1]) / (len(faults) - 2) < 10


@pytest.mark.parametrize("memory", ["1MiB", "100MiB"])
def test_no_context_fits_a_tiny_budget(model, memory):
    """A KV cache far beyond the machine is not even tried."""
    message = refusal(model, memory, context=1_000_000)
    smallest = int(re.search(r"the smallest that works is .* \((\d+) bytes\), with --ctx 256", message)[1])
    assert 200 * MIB < smallest < model.stat().st_size


def test_context_that_does_not_fit_names_one_that_does(model, smallest):
    budget = smallest + 100 * MIB
    message = refusal(model, budget, context=1_000_000)
    assert "KV cache of 1000000 tokens" in message
    fits = int(re.search(r"--ctx (\d+) fits", message)[1])
    assert fits >= CONTEXT
    result = subprocess.run(
        [*command(model, budget, tokens=1, context=fits), "--json"], capture_output=True, timeout=100
    )
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["peak_memory_bytes"] <= budget
