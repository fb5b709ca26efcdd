"""`edgeinfer stream`: models on a sound, on frames or on pictures as they arrive."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from edgeinfer.cli.plan_onnx import say
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.errors import InputError
from edgeinfer.exporters.output import Target
from edgeinfer.streams.description import GateDescription, StageDescription, read_pipeline
from edgeinfer.streams.feeder import LATE_RULES

RESULTS = (".wav", ".jsonl", ".npz")


@click.command(
    epilog="""\b
    Examples:
      edgeinfer stream silero_vad.onnx -i talk.wav
      edgeinfer stream gtcrn.onnx -i talk.wav -o clean.wav --gate silero_vad.onnx
      arecord -t raw -f S16_LE -r 16000 | edgeinfer stream silero_vad.onnx -i - --raw s16
      edgeinfer stream detect-then-classify.json -i frames/ -o found.jsonl
    """
)
@click.argument("model")
@click.option(
    "-i",
    "--input",
    "source",
    required=True,
    metavar="SOURCE",
    help="A .wav file, a folder of pictures, or -.",
)
@click.option(
    "-o", "--output", metavar="OUT", help="Write a .wav, .jsonl or .npz file; - prints lines of JSON."
)
@click.option(
    "--gate", metavar="MODEL", help="Run only where this model asks, such as one that hears speech."
)
@click.option("--threshold", metavar="P", type=float, help="What the gate's probability has to reach.")
@click.option("--realtime", is_flag=True, help="Read a file as fast as it would be heard.")
@click.option(
    "--late",
    type=click.Choice(LATE_RULES),
    help="When computing is late. Default: drop-oldest if live, else wait.",
)
@click.option(
    "--queue",
    "depth",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=8,
    show_default=True,
    help="Pieces that may wait.",
)
@click.option(
    "--raw", metavar="FORMAT", help="Samples on standard input: s16, f32:16000, s16:16000:2; or frames."
)
@click.option("--resample", is_flag=True, help="Bring a sound to the model's sample rate.")
@click.option("--state", metavar="OUT=IN", multiple=True, help="This output is the next value of that input.")
@click.option(
    "--form", metavar="NAME", help="What the model's inputs and outputs mean, or a JSON file that says it."
)
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... Default: what is free now.")
@click.option("--threads", metavar="N", type=click.IntRange(1, 512), help="Computing threads.")
@click.option("--provider", metavar="NAME", help="Compute on cpu, cuda or tensorrt.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all numbers.")
def stream(model: str, source: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Feed SOURCE to the ONNX file MODEL, or to a pipeline of models (a JSON file), as it arrives.

    State goes from step to step. Taking the stream and computing overlap. Ctrl-C ends a live stream and keeps
    what was made of it.
    """
    from edgeinfer.streams.pipeline import open_pipeline
    from edgeinfer.streams.running import run_pipeline
    from edgeinfer.streams.sources import PipedSound, offered_rate

    if output not in (None, "-") and Path(output).suffix.lower() not in RESULTS:
        raise InputError(f"-o {output}: expected a name that ends in {', '.join(RESULTS)}, or -.")
    target = Target(output, options["force"]) if output not in (None, "-") else contextlib.nullcontext()
    stages = _stages(model, options)
    live = options["realtime"] or source == "-"
    with ProgressLine("Preparing the models"):
        names = ("memory", "threads", "provider")
        piped = PipedSound(options["raw"]) if source == "-" else None
        pipeline = open_pipeline(
            stages,
            rate=lambda: piped.rate if piped else offered_rate(source),
            say=say,
            **{name: options[name] for name in names},
        )
    interrupted = False
    with pipeline, target as part:
        pieces = _source(source, piped, pipeline, options)
        sink = _sink(part, output, pipeline, as_json)
        with contextlib.closing(sink):
            late = options["late"] or ("drop-oldest" if live else "wait")
            try:
                report = run_pipeline(
                    pipeline,
                    pieces,
                    sink.take,
                    late=late,
                    depth=options["depth"],
                    live=live,
                    seconds_of=_length_of(pipeline) if options["late"] is None else None,
                )
            except KeyboardInterrupt as error:
                if not error.args:
                    raise
                report, interrupted = error.args[0], True
    click.echo(json.dumps(asdict(report)) if as_json else report.line(), err=output == "-" or not as_json)
    if interrupted:
        raise KeyboardInterrupt


def _stages(model: str, options: dict[str, Any]) -> list[StageDescription]:
    """The pipeline of a JSON file, or the one that the options describe."""
    path = Path(model)
    if _is_description(path):
        for name in ("gate", "threshold", "state", "form"):
            if options[name]:
                raise InputError(f"--{name} belongs to a model; {model} is a pipeline. Say it in the file.")
        return read_pipeline(path)
    last = StageDescription(path, path.stem, options["form"], _pairs(options["state"]))
    gate = options["gate"]
    if gate is None:
        if options["threshold"] is not None:
            raise InputError("--threshold is that of a gate. Give the gate's model with --gate.")
        return [last]
    name = Path(gate).stem if Path(gate).stem != path.stem else f"{path.stem}-gate"
    first = StageDescription(Path(gate), name)
    return [first, replace(last, gate=GateDescription(by=name, above=options["threshold"]))]


def _is_description(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{"
    except OSError:
        return False


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        output, equals, name = text.rpartition("=")
        if not equals or not output or not name:
            raise InputError(f"--state {text} cannot be read. Expected OUTPUT=INPUT.")
        pairs[name] = output
    return pairs


def _length_of(pipeline: Any) -> Callable[[Any], float] | None:
    """Of a piece, in seconds: a pipe that gives more than is heard in the time is not live, and waits."""
    return (lambda samples: len(samples) / pipeline.rate) if pipeline.on_sound else None


def _source(source: str, piped: Any, pipeline: Any, options: dict[str, Any]) -> Iterable[Any]:
    from edgeinfer.streams import sources

    first = next(iter(pipeline.streams.values()))
    if not pipeline.on_sound:
        return _frames(source, first, options)
    live = options["realtime"] or source == "-"
    piece = round((sources.PIECE_SECONDS if live else sources.FAST_PIECE_SECONDS) * pipeline.rate)
    if source != "-":
        if options["raw"]:
            raise InputError("--raw is for standard input: -i -.")
        pieces = sources.wav_source(source, pipeline.rate, piece, options["resample"])
        return (
            sources.paced(pieces, _length_of(pipeline)) if options["realtime"] else pieces
        )
    return piped.pieces(pipeline.rate, piece, options["resample"])


def _frames(source: str, first: Any, options: dict[str, Any]) -> Iterator[Any]:
    from edgeinfer.inputs.images import is_picture_port
    from edgeinfer.streams import sources

    if options["realtime"]:
        raise InputError("--realtime is for sounds: frames and pictures have no length of their own.")
    if source == "-":
        return sources.frame_source(first.input)
    if not Path(source).is_dir():
        raise InputError(
            f"{source} is no folder. This model takes {first.input.describe()} a step: give a folder of "
            "pictures, or frames "
            "on standard input (-i -)."
        )
    if not is_picture_port(first.input):
        raise InputError(f"Input {first.input.name!r} is {first.input.describe()}, which takes no pictures.")
    return sources.picture_source(source)


def _sink(part: Path | None, output: str | None, pipeline: Any, as_json: bool) -> Any:
    from edgeinfer.streams import sinks

    if part is not None:
        suffix = Path(output).suffix.lower()
        if suffix == ".jsonl":
            return _closing_json(part, pipeline)
        return (sinks.WavSink if suffix == ".wav" else sinks.NpzSink)(part, pipeline)
    if output == "-":
        return sinks.JsonSink(sys.stdout, pipeline)
    return sinks.TextSink(None if as_json else sys.stdout, pipeline)


def _closing_json(part: Path, pipeline: Any) -> Any:
    from edgeinfer.streams.sinks import JsonSink

    return JsonSink(part.open("w", encoding="utf-8"), pipeline, close=True)
