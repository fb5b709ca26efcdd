"""What a user of the command line sees: text, JSON, messages, exit codes. Whole path: test_run_command.py."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from engine_doubles import ScriptedEngine

import edgeinfer
from edgeinfer.cli import cli
from edgeinfer.cli.chat import forget_oldest
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.cli.run import closing_line
from edgeinfer.model import Model, Stats

JSON_KEYS = (
    "text tokens prompt_tokens generated_tokens load_seconds time_to_first_token_seconds tokens_per_second "
    "budget_bytes peak_memory_bytes resident_bytes streamed_bytes_per_token disk_bytes_per_second "
    "disk_wait_fraction mode"
).split()


class ScriptedModelEngine(ScriptedEngine):
    """A scripted engine that can also read any prompt, one token a byte."""

    def __init__(self, pieces, fail=None, **options):
        super().__init__(pieces, **options)
        self._fail = fail
        self.prompts = []
        self.model.vocab = None
        self.model.chat_template = None
        self.model.tokenize = self._tokenize

    def _tokenize(self, text, add_special, parse_special):
        self.prompts.append(text)
        return list(text.encode())

    def decode(self, tokens):
        super().decode(tokens)
        if self._fail:
            raise self._fail

    def truncate(self, length):
        self.position = length
        self._next = 0

    def close(self):
        pass


@pytest.fixture
def run(monkeypatch):
    """Runs the command with a scripted engine: `run.engine`; `run.loaded` is what `load` was given."""

    def run(*args, pieces=(b"Hello", b" there", None), input="", fail=None, **options):
        run.engine = ScriptedModelEngine(list(pieces), fail, **options)

        def load(*load_args, **load_options):
            run.loaded = (load_args, load_options)
            return Model(run.engine)

        monkeypatch.setattr(edgeinfer, "load", load)
        return CliRunner().invoke(cli, ["run", *args], input=input)

    return run


def test_text_goes_to_standard_output_and_numbers_to_standard_error(run):
    result = run("-p", "Say hello")
    assert (result.exit_code, result.stdout) == (0, "Hello there\n")
    assert result.stderr.startswith(("1", "2", "3", "4", "5", "6", "7", "8", "9"))
    assert "tokens/s, peak memory 1.00 MiB of 1.00 GiB, 10 B read per token, 0% of the time" in result.stderr
    assert result.stderr.count("\n") == 1


def test_json_has_exactly_the_documented_keys(run):
    result = run("-p", "x", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    data = json.loads(result.stdout)
    assert list(data) == JSON_KEYS
    assert (data["text"], data["tokens"], data["prompt_tokens"]) == ("Hello there", [0, 1], 1)
    assert data["mode"] == "streaming" and data["streamed_bytes_per_token"] == 10


def test_json_of_a_single_token_has_no_speed(run):
    assert json.loads(run("-p", "x", "-n", "1", "--json").stdout)["tokens_per_second"] is None


def test_options_reach_the_model(run):
    run("some.gguf", "-p", "x", "--memory", "50%", "--ctx", "99", "--threads", "3")
    (path,), options = run.loaded
    assert path == "some.gguf"
    progress = options.pop("progress")
    assert callable(progress) and options == {"memory": "50%", "ctx": 99, "threads": 3}


@pytest.mark.parametrize(("typed", "prompt"), [("Once\n", "Once"), ("a\nb\r\n", "a\nb"), ("a\n\n", "a\n")])
def test_piped_input_is_the_prompt(run, typed, prompt):
    assert run(input=typed).exit_code == 0
    assert run.engine.prompts == [prompt]


@pytest.mark.parametrize(
    ("args", "input", "message"),
    [
        (["-p", ""], "", "Error: The prompt is empty. Give one with -p, or on standard input."),
        (["-p", "  "], "", "Error: The prompt is empty."),
        ([], "", "Error: The prompt is empty."),
        ([], b"caf\xe9 au lait", "Error: The prompt on standard input is not UTF-8 text (byte 3 is 0xe9)."),
        (
            ["-p", "y" * 101],
            "",
            "Error: The prompt has 101 tokens, but the context holds 100. Shorten the prompt",
        ),
    ],
)
def test_prompts_that_cannot_be_used(run, args, input, message):
    result = run(*args, input=input)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-n", "0"], "Invalid value for '-n': 0 is not in the range x>=1."),
        (["-n", "many"], "Invalid value for '-n': 'many' is not a valid integer"),
        (["--temperature", "-1"], "Invalid value for '--temperature': -1.0 is not in the range x>=0."),
        (["--temperature", "nan"], "Invalid value for '--temperature': nan is not a finite number."),
        (["--temperature", "inf"], "inf is not a finite number."),
        (["--top-p", "1.5"], "Invalid value for '--top-p': 1.5 is not in the range 0<x<=1."),
        (["--top-p", "nan"], "nan is not a finite number."),
        (["--seed", "-3"], "Invalid value for '--seed': -3 is not in the range"),
        (["--ctx", "0"], "Invalid value for '--ctx': 0 is not in the range"),
        (["--threads", "0"], "Invalid value for '--threads': 0 is not in the range"),
        (["a.gguf", "b.gguf"], "Got unexpected extra argument (b.gguf)"),
        (["--fast"], "No such option"),
    ],
)
def test_options_that_cannot_be_read(run, args, message):
    result = run("-p", "x", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "error", [edgeinfer.ReadError("The disk failed at byte 7."), edgeinfer.EngineError("llama.cpp said no.")]
)
def test_errors_in_the_middle_are_one_message_and_exit_code_1(run, error):
    result = run("-p", "x", fail=error)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {error}\n"
    assert run("-p", "x", "--json", fail=error).stdout == ""


def test_ctrl_c_exits_with_130(run):
    result = run("-p", "x", fail=KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("args", [["run", "-p", "x", "-n", "2"], ["run", "-p", "x", "-n", "2", "--json"]])
def test_a_full_disk_under_the_output_is_one_message(args):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "edgeinfer", *args], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: The output could not be written: No space left on device.")
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(("closed", "code", "shown"), [(">&-", 1, "Standard output is closed"), ("2>&-", 0, "")])
def test_closed_standard_streams(closed, code, shown):
    command = f"exec {sys.executable} -m edgeinfer run -p x -n 2 </dev/null {closed}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == code
    assert shown in result.stderr and "Traceback" not in result.stderr
    assert bool(result.stdout) == (code == 0)


def test_a_system_that_cannot_stream_is_told(run, monkeypatch):
    monkeypatch.setattr("edgeinfer.cli.run.streaming_support", lambda: False)
    result = run("-p", "x")
    assert (result.exit_code, result.stdout) == (0, "Hello there\n")
    assert result.stderr.startswith("Streaming is off on this system: the model is held in memory")


def test_full_context_is_said(run):
    result = run("-p", "x", pieces=[b"a"] * 50, context_length=10)
    assert result.stdout == "a" * 10 + "\n"
    assert result.stderr.startswith("The context of 10 tokens is full; --ctx sets its size.\n")


def test_closing_line():
    assert closing_line(Stats(tokens_per_second=0.9476)).startswith("0.948 tokens/s, ")
    assert closing_line(Stats(tokens_per_second=1234.5)).startswith("1,234 tokens/s, ")
    stats = Stats(time_to_first_token_seconds=1.234, disk_wait_fraction=0.456, budget_bytes=3 << 30)
    stats = Stats(**{**vars(stats), "streamed_bytes_per_token": 2.5 * 2**30, "peak_memory_bytes": 2 << 30})
    assert closing_line(stats) == (
        "first token after 1.23 s, peak memory 2.00 GiB of 3.00 GiB, 2.50 GiB read per token, "
        "46% of the time waiting for the disk"
    )


def test_chat_forgets_the_oldest_turns_in_time():
    model = Model(ScriptedModelEngine([None], context_length=100))
    messages = [{"role": role, "content": "x" * 20} for role in ("user", "assistant") * 3]
    messages.append({"role": "user", "content": "now"})
    forget_oldest(model, messages)
    assert [len(message["content"]) for message in messages] == [20, 20, 3]
    messages = [{"role": "user", "content": "y" * 300}]
    forget_oldest(model, messages)  # nothing to forget: the prompt itself is too long, which `chat` tells
    assert len(messages) == 1


def test_progress_line_appears_after_a_second_with_the_time_left(capfd):
    with ProgressLine("Reading") as progress:
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
    with ProgressLine("Reading") as progress:
        progress(0.25)
        time.sleep(1.2)
        progress.done()
        progress.done()
    assert capfd.readouterr().err == "Reading: 25%, 3 s left\n"
    progress(0)
    assert progress.text(7) == "Reading: 7 s so far"
    progress(0.5)
    assert progress.text(300) == "Reading: 50%, 5 min left"
    progress(0.01)
    assert progress.text(600) == "Reading: 1%, 16.5 h left"


def test_help_imports_nothing_heavy_and_shows_examples():
    code = "import sys; from edgeinfer.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Run models that are larger than the memory they may use." in help_text
    assert not {"llama_cpp", "numpy", "onnxruntime", "jinja2"} & set(help_text.splitlines()[-1].split())
    result = CliRunner().invoke(cli, ["run", "--help"])
    assert 'edgeinfer run -p "Once upon a time"' in result.stdout


def test_unknown_command():
    result = CliRunner().invoke(cli, ["walk"])
    assert result.exit_code == 2
    assert "No such command 'walk'" in result.stderr
