"""`edgeinfer run`: let a GGUF model write, or chat with it; or run an ONNX model on inputs from files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

import edgeinfer
from edgeinfer.budget import format_size
from edgeinfer.cli.chat import chat
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.errors import ModelFileError, PromptError
from edgeinfer.kind import model_kind
from edgeinfer.system import STREAMING_OFF, streaming_support

_ONNX = "ONNX:"
#: Parameters that only a model that writes has.
WRITING = ("tokens", "temperature", "top_p", "seed", "ctx")

EXPERT_RATES = {
    "expert_hit_rate": "experts found in memory",
    "prediction_precision": "prediction precision",
    "prediction_recall": "recall",
}


def _finite(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


@click.command(
    epilog="""\b
    Examples:
      edgeinfer run -p "Once upon a time"
      edgeinfer run big.gguf --memory 2GiB
      cat question.txt | edgeinfer run big.gguf --memory 50% -n 200
      edgeinfer run detect.onnx --input street.jpg -o found.png
      edgeinfer run model.onnx --input ids=ids.npy --input mask=mask.npy -o out.npz
    """
)
@click.argument("model", required=False)
@click.option("-p", "--prompt", help="The prompt. Without it: a chat on a terminal, else standard input.")
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... Default: what is free now.")
@click.option(
    "-n", "tokens", metavar="TOKENS", type=click.IntRange(min=1), help="Write at most this many tokens."
)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    callback=_finite,
    help="0 always takes the most probable token.",
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=0.95,
    show_default=True,
    callback=_finite,
    help="Choose among the most probable tokens that have this share together.",
)
@click.option("--seed", metavar="S", type=click.IntRange(0, 2**32 - 2), help="Makes the same choices again.")
@click.option("--ctx", metavar="N", type=click.IntRange(1, 2**31 - 1), help="Tokens of context.")
@click.option("--threads", metavar="N", type=click.IntRange(1, 512), help="Computing threads.")
@click.option(
    "--input", "given", metavar="[NAME=]FILE", multiple=True, help=f"{_ONNX} array, picture, sound, number."
)
@click.option("-o", "--output", metavar="OUT", help=f"{_ONNX} write a .npz, .json, .png, .jpg or .wav file.")
@click.option("--form", metavar="NAME", help=f"{_ONNX} what inputs and outputs mean, or a JSON file of it.")
@click.option("--resize", metavar="HOW", help=f"{_ONNX} stretch, crop, pad, 640x480, or both: pad:640x480.")
@click.option("--normalize", metavar="HOW", help=f"{_ONNX} none, unit, half, imagenet, clip, or MEAN/STD.")
@click.option("--resample", is_flag=True, help=f"{_ONNX} bring a sound to the model's sample rate.")
@click.option("--labels", metavar="FILE", help=f"{_ONNX} names of the classes, a line each, or JSON.")
@click.option("--top", metavar="N", type=click.IntRange(min=1), help=f"{_ONNX} show so many classes: 5.")
@click.option("--threshold", metavar="P", type=float, help=f"{_ONNX} the least score of a box.")
@click.option("--provider", metavar="NAME", help=f"{_ONNX} compute on cpu, cuda or tensorrt.")
@click.option("--force", is_flag=True, help=f"{_ONNX} replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the text and all numbers.")
def run(
    model: str | None,
    prompt: str | None,
    memory: str | None,
    tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    ctx: int | None,
    threads: int | None,
    as_json: bool,
    **onnx: Any,
) -> None:
    """Let the GGUF file MODEL write, or run the ONNX file MODEL on --input, within a memory budget. An ONNX
    decoder beside its tokenizer.json writes too.

    Without MODEL, the small story writer that comes with edgeinfer. A model with a chat template answers the
    prompt, any other continues it.
    """
    if model is not None and model_kind(model) == "onnx" and not _writes(model, onnx["given"]):
        _refuse(WRITING, "a model that writes", f"{model} does not")
        _run_onnx(model, prompt, memory, threads, as_json, onnx)
        return
    _refuse(tuple(onnx), "an ONNX model", f"{model} is none, or writes" if model else "no MODEL was given")
    is_chat = prompt is None and not as_json and _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    if not is_chat:
        prompt = _read_prompt() if prompt is None else prompt
        if not prompt.strip():
            raise PromptError("The prompt is empty. Give one with -p, or on standard input.")
    options = {"max_tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with ProgressLine("Loading the model") as progress:
        loaded = edgeinfer.load(model, memory=memory, ctx=ctx, threads=threads, progress=progress)
    if not streaming_support():
        click.echo(STREAMING_OFF, err=True)
    with loaded:
        if is_chat:
            chat(loaded, options)
            if loaded.stats.generated_tokens:
                click.echo(closing_line(loaded.stats), err=True)
        else:
            _write(loaded, prompt, options, as_json)


def _writes(model: str, given: Sequence[str]) -> bool:
    """Whether an ONNX model is a decoder that is to continue a text, and not to be run on arrays."""
    from edgeinfer.engines.decoder import is_decoder_file

    return not given and is_decoder_file(model)


def _refuse(names: Sequence[str], owner: str, why: str) -> None:
    """Options of the other kind of model are an error, not silently dropped."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
        if given and parameter.name in names:
            model = context.params.get("model")
            if model is not None and not os.path.exists(model):  # its name alone does not tell its kind
                raise ModelFileError(f"{model}: there is no such file. Check the path of the model.")
            raise click.UsageError(f"{parameter.opts[-1]} is for {owner}; {why}.")


def _run_onnx(
    model: str,
    prompt: str | None,
    memory: str | None,
    threads: int | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from edgeinfer.cli.run_onnx import OnnxRequest, run_onnx
    from edgeinfer.inputs import InputOptions

    taken = {name: options.pop(name) for name in ("resize", "normalize")}
    options["top"] = options["top"] or 5
    feeding = InputOptions(**taken, text=prompt)
    run_onnx(OnnxRequest(model, options=feeding, memory=memory, threads=threads, as_json=as_json, **options))


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _read_prompt() -> str:
    """Standard input, without the newline that `echo` adds."""
    if sys.stdin is None:
        raise PromptError("There is no standard input to read the prompt from. Give it with -p.")
    if sys.stdin.isatty():
        click.echo("Type the prompt, then Ctrl-D.", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#x}"
        raise PromptError(f"The prompt on standard input is not UTF-8 text ({found}).") from None
    return text.removesuffix("\n").removesuffix("\r")


def _write(model: edgeinfer.Model, prompt: str, options: dict[str, Any], as_json: bool) -> None:
    with ProgressLine("Reading the prompt") as progress:
        if model.has_chat_template:
            pieces = model.chat([{"role": "user", "content": prompt}], progress=progress, **options)
        else:
            pieces = model.generate(prompt, progress=progress, **options)
        with closing(pieces):
            for piece in pieces:
                progress.done()
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
    if as_json:
        click.echo(json.dumps(_facts(model.stats)))
        return
    click.echo()
    if model.finish == "context":
        click.echo(f"The context of {model.context_length:,} tokens is full; --ctx sets its size.", err=True)
    click.echo(closing_line(model.stats), err=True)


def _facts(stats: edgeinfer.Stats) -> dict[str, Any]:
    """What --json prints: the numbers of experts only for a model that keeps a cache of them."""
    facts = asdict(stats)
    return {name: value for name, value in facts.items() if name not in EXPERT_RATES or value is not None}


def closing_line(stats: edgeinfer.Stats) -> str:
    """The numbers of a generation in one line."""
    parts = []
    if stats.tokens_per_second is not None:
        speed = stats.tokens_per_second
        parts.append(f"{speed:,.0f} tokens/s" if speed >= 100 else f"{speed:.3g} tokens/s")
    elif stats.time_to_first_token_seconds is not None:
        parts.append(f"first token after {stats.time_to_first_token_seconds:.2f} s")
    parts.append(
        f"peak memory {format_size(stats.peak_memory_bytes)} of {format_size(stats.budget_bytes)}"
    )
    parts.append(f"{format_size(round(stats.streamed_bytes_per_token))} read per token")
    parts.append(f"{stats.disk_wait_fraction:.0%} of the time waiting for the disk")
    for name, label in EXPERT_RATES.items():
        if getattr(stats, name) is not None:
            parts.append(f"{label} {getattr(stats, name):.0%}")
    return ", ".join(parts)
