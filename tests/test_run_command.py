"""The whole path of `edgeinfer run`, in processes of its own, against stock llama.cpp."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import pytest
import tiny  # noqa: F401  (puts benchmarks/ on the path)
from terminal import Terminal

import edgeinfer
from benchmarks.maker import make_model

DATA = os.environ.get("EDGEINFER_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
STORIES = Path(DATA or "", "lm/stories260K.gguf")
MIXTURE = Path(DATA or "", "lm/stories260K-moe4x.gguf")
RUN = [sys.executable, "-m", "edgeinfer", "run"]
SMALL_BUDGET = "200MiB"  # the slow model does not fit
PROMPT = "Once upon a time, there was a little girl"


def run(*args, **options):
    command = [*RUN, *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=60, **options)


def without_progress(errors):
    """Standard error without the lines that a busy machine may need."""
    return re.sub(r"(Loading the model|Reading the prompt): .*\n", "", errors.decode())


@pytest.fixture(scope="module")
def stock():
    """Greedy stock llama.cpp: ids and text of a model's answer."""

    @functools.cache
    def greedy(path, prompt, max_tokens):
        options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        llama = llama_cpp.Llama(str(path), **options)
        answer = llama(prompt, max_tokens=max_tokens, temperature=0, repeat_penalty=1.0)
        tokens = []
        for token in llama.generate(llama.tokenize(prompt.encode()), temp=0, repeat_penalty=1.0):
            if token == llama.token_eos() or len(tokens) == max_tokens:
                break
            tokens.append(token)
        llama.close()
        return tokens, answer["choices"][0]["text"]

    return greedy


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A made model large enough that an answer takes seconds."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    yield make_model(path, "llama", "F16", size=150_000_000, vocabulary=4000, context=2048)
    path.unlink()


@pytest.mark.parametrize("path", [STORIES, MIXTURE], ids=lambda path: path.stem)
@pytest.mark.parametrize("memory", [[], ["--memory", "1GiB"], ["--memory", "90%"]], ids=" ".join)
def test_greedy_text_equals_stock(path, memory, stock):
    tokens, text = stock(path, PROMPT, 120)
    options = ["-n", 120, "--temperature", 0, "--threads", 1, "--json"]
    result = run(path, "-p", PROMPT, *options, *memory)
    assert result.returncode == 0, result.stderr.decode()
    answer = json.loads(result.stdout)
    assert answer["tokens"] == tokens
    assert answer["text"] == text and len(text) > 200
    assert answer["generated_tokens"] == len(tokens) == 120
    assert 0 < answer["peak_memory_bytes"] <= answer["budget_bytes"]
    assert answer["tokens_per_second"] > 1 and answer["load_seconds"] > 0
    assert 0 <= answer["disk_wait_fraction"] <= 1


def test_prompt_from_a_pipe_and_from_an_option_are_the_same():
    args = [STORIES, "-n", 30, "--seed", 5]
    piped = run(*args, input=PROMPT.encode() + b"\n")
    given = run(*args, "-p", PROMPT)
    assert piped.stdout == given.stdout and len(given.stdout) > 30
    assert b"tokens/s, peak memory" in piped.stderr


def test_the_same_in_python(stock):
    with edgeinfer.load(STORIES, memory="1GiB") as model:
        text = "".join(model.generate(PROMPT, max_tokens=60, temperature=0))
        assert model.stats.text == text == stock(STORIES, PROMPT, 60)[1]
        assert model.stats.budget_bytes == 1 << 30


def test_closed_pipe_ends_quietly(slow_model):
    process = subprocess.Popen(
        [*RUN, slow_model, "-p", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert without_progress(process.stderr.read()) == ""
    process.stderr.close()


def test_ctrl_c_ends_a_run_soon(slow_model):
    process = subprocess.Popen(
        [*RUN, slow_model, "-p", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 3  # half a second, and the end of a Python process
    assert process.returncode == 130
    assert without_progress(errors) == "\n"


def test_streamed_answer_equals_stock_and_stays_in_the_budget(slow_model):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
    llama = llama_cpp.Llama(str(slow_model), **options)
    expected = llama(PROMPT, max_tokens=12, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]
    llama.close()
    options = ["--memory", SMALL_BUDGET, "--ctx", 256, "--threads", 1, "-n", 12, "--temperature", 0, "--json"]
    result = run(slow_model, "-p", PROMPT, *options)
    assert result.returncode == 0, result.stderr.decode()
    answer = json.loads(result.stdout)
    assert answer["mode"] == "streaming"
    assert answer["text"] == expected
    assert answer["peak_memory_bytes"] <= answer["budget_bytes"]
    assert answer["streamed_bytes_per_token"] > 10e6
    assert answer["disk_bytes_per_second"] > 1e6


def test_ctrl_c_in_the_middle_of_a_streamed_prefill(slow_model):
    options = ["--memory", SMALL_BUDGET, "--ctx", "1200", "--threads", "1"]
    with Terminal([*RUN, str(slow_model), *options]) as terminal:
        terminal.wait_for("> ")
        terminal.type("a b c d e " * 80 + "\n")
        terminal.wait_for("a b c d e \r\n")
        time.sleep(0.3)
        terminal.type("\x03")
        assert terminal.wait_for("Stopped.") < 2.0  # usually 0.1; a loaded machine is slower
        answer = terminal.screen.rpartition("a b c d e \r\n")[2].partition("Stopped.")[0]
        assert not re.search("[a-z]{3}", answer)  # it was the prefill that stopped
        terminal.wait_for("> ")
        terminal.type("go on\n")
        terminal.wait_for(r"go on\r\n.{10}")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


ANSWER = r"[^>]*?[A-Za-z ,.'\r\n]{24}"  # and not the line that says "Reading the prompt: 1 s so far"


def test_chat_on_a_terminal(slow_model):
    with Terminal([*RUN, str(slow_model), "--seed", "1"]) as terminal:
        terminal.wait_for("no chat template")
        terminal.wait_for("Ctrl-D leaves.")
        terminal.wait_for("> ")
        terminal.type("hello there\n")
        terminal.wait_for(rf"hello there\r\n{ANSWER}")  # it has begun
        terminal.type("\x03")
        assert terminal.wait_for("Stopped.") < 2.0  # usually 0.1; a loaded machine is slower
        terminal.wait_for("> ")
        terminal.type("go on\n")
        terminal.wait_for(rf"go on\r\n{ANSWER}")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.press_until("\x03", "Ctrl-D leaves.")  # nothing to stop
        terminal.wait_for("> ")
        terminal.type("\x04")
        terminal.wait_for("tokens/s, peak memory")
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.screen


def test_chat_forgets_the_oldest_turns_instead_of_failing():
    with Terminal([*RUN, str(STORIES), "--ctx", "256", "-n", "60", "--seed", "1"]) as terminal:
        for _ in range(5):
            terminal.wait_for("> ")
            terminal.type("Once upon a time there was a dog.\n")
        terminal.wait_for("oldest turns are forgotten")
        terminal.wait_for("> ")
        terminal.type("word " * 300 + "\n")
        terminal.wait_for("the context holds 256")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.gguf"], "missing.gguf"),
        ([STORIES, "--memory", "lots"], "'lots'"),
        ([STORIES, "--memory", "1KiB"], "KiB"),
        ([Path(DATA or "", "vocab/ggml-vocab-gpt-2.gguf")], "vocab"),
        ([Path(DATA or "", "lm")], "lm"),
        ([Path(__file__)], "GGUF"),
        ([STORIES, "-p", "word " * 3000], "Shorten the prompt"),
    ],
)
def test_what_cannot_run_is_one_message_and_exit_code_1(args, message, tmp_path):
    result = run("-p", "x", *args, cwd=tmp_path)
    errors = without_progress(result.stderr)
    assert result.returncode == 1 and result.stdout == b""
    assert errors.startswith("Error: ") and message in errors
    assert "Traceback" not in errors
