"""`edgeinfer run` on an ONNX model: inputs from files, outputs to files or for people."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgeinfer.budget import format_size
from edgeinfer.cli.plan_onnx import say
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.errors import InputError
from edgeinfer.exporters.output import Target
from edgeinfer.forms import Form, find_form, read_form
from edgeinfer.inputs import Fed, InputOptions, gather_feeds
from edgeinfer.inputs.files import InputFiles, kind_of
from edgeinfer.outputs.arrays import json_array, plain, summary, write_npz
from edgeinfer.outputs.reading import Finding, Reader

RESULTS = (".npz", ".json", ".png", ".jpg", ".jpeg", ".wav")


@dataclass(frozen=True)
class OnnxRequest:
    """What the command line asks of an ONNX model."""

    model: str
    given: Sequence[str]
    output: str | None = None
    force: bool = False
    labels: str | None = None
    top: int = 5
    threshold: float | None = None
    form: str | None = None
    options: InputOptions = InputOptions()
    resample: bool = False
    memory: str | None = None
    threads: int | None = None
    provider: str | None = None
    as_json: bool = False


def run_onnx(request: OnnxRequest) -> None:
    """Raises EdgeInferError, before anything is computed where that is possible."""
    from edgeinfer.engines.onnx import open_onnx

    _check_output(request.output)
    target = Target(request.output, request.force) if request.output else contextlib.nullcontext()
    with ProgressLine("Preparing the model") as progress:
        options = {"memory": request.memory, "threads": request.threads, "provider": request.provider}
        model = open_onnx(request.model, progress=progress, say=say, **options)
    with model:
        path = Path(request.model)
        form = read_form(request.form) if request.form else find_form(model.inputs, model.outputs)
        reader = Reader(model, form, path, request.labels)
        with ProgressLine("Running the model"):
            result = _run(model, form, path, request)
        is_read = reader.kind == "classes" or result.fed.placement is not None  # boxes want their picture
        kind = reader.kind if is_read else None
        findings = reader.read(result.arrays, result.fed.placement, request.top, request.threshold)
        if request.provider not in (None, model.plan.provider):
            click.echo(f"Computed on {model.plan.provider}. {model.plan.provider_reason}", err=True)
        for note in result.fed.notes:
            click.echo(note, err=True)
        with target as part:
            if part is not None:
                _write(part, Path(request.output).suffix.lower(), result, kind, findings)
        if request.as_json:
            click.echo(json.dumps(_facts(model, result, kind, findings), allow_nan=False))
            return
        if part is None or kind is not None:
            click.echo(_text(result, kind, findings))
        if kind is not None and result.batch > 1:
            say(f"Shown is the first of a batch of {result.batch}; -o OUT.npz has all outputs.")
        click.echo(_closing_line(model, result), err=True)


@dataclass
class _Result:
    arrays: Mapping[str, np.ndarray]
    fed: Fed
    seconds: float
    sound: np.ndarray | None = None
    rate: int = 0

    @property
    def batch(self) -> int:
        """Of how many inputs the outputs are; 1 where that is not known."""
        if self.sound is not None or not self.fed.arrays:
            return 1
        arrays = (*self.arrays.values(), *self.fed.arrays.values())
        sizes = {array.shape[0] if array.ndim else 1 for array in arrays}
        return sizes.pop() if len(sizes) == 1 else 1


def _run(model: Any, form: Form | None, path: Path, request: OnnxRequest) -> _Result:
    files = InputFiles()
    sound = _whole_sound(form, request, files)
    if sound is not None:
        return _run_sound(model, form, sound, request, files)
    fed = gather_feeds(model.inputs, model.outputs, request.given, form, path, request.options, files)
    start = time.perf_counter()
    arrays = model.run(fed.arrays)
    return _Result(arrays, fed, time.perf_counter() - start)


def _whole_sound(form: Form | None, request: OnnxRequest, files: InputFiles) -> str | None:
    """The sound file that is to go through the model step by step, where the form says how."""
    if form is None or form.framing is None or len(request.given) != 1:
        return None
    given = request.given[0]
    name = given.removeprefix(f"{form.framing.input}=")
    if name != "-" and not Path(name).is_file():
        return None
    with files(name) as file:
        return name if kind_of(file) == "sound" else None


def _run_sound(model: Any, form: Form, name: str, request: OnnxRequest, files: InputFiles) -> _Result:
    """All steps of a sound; the outputs are stacked: [steps, ...]."""
    from edgeinfer.streams.model_stream import ModelStream
    from edgeinfer.streams.sources import offered_rate, wav_source

    rate = offered_rate(name, files)
    stream = ModelStream(model, form, rate=rate if form.framing.takes(rate) else None)
    steps = []
    for samples in wav_source(name, stream.rate, stream.rate, request.resample, files):
        steps += stream.feed(samples)
    steps += stream.finish()
    names = steps[0].outputs if steps else ()
    arrays = {output: np.stack([step.outputs[output] for step in steps]) for output in names}
    sound = stream.take_sound() if stream.makes_sound else None
    if sound is not None:
        arrays["sound"] = sound
    return _Result(arrays, Fed(), stream.busy_seconds, sound, stream.rate)


def _check_output(output: str | None) -> None:
    if output is not None and Path(output).suffix.lower() not in RESULTS:
        raise InputError(f"-o {output}: expected a name that ends in {', '.join(RESULTS)}.")


def _write(part: Path, suffix: str, result: _Result, kind: str | None, findings: Sequence[Finding]) -> None:
    if suffix == ".npz":
        write_npz(part, result.arrays)
    elif suffix == ".json":
        part.write_text(json.dumps(_outputs(result, kind, findings), allow_nan=False) + "\n", "utf-8")
    elif suffix == ".wav":
        _write_wav(part, result)
    else:
        _write_picture(part, suffix, result, kind, findings)


def _write_wav(part: Path, result: _Result) -> None:
    import wave

    from edgeinfer.streams.sinks import pcm16

    if result.sound is None:
        raise InputError("The model made no sound that could be written as .wav. Give -o a .npz or .json.")
    with wave.open(str(part), "wb") as file:
        file.setparams((1, 2, result.rate, 0, "NONE", ""))
        file.writeframes(pcm16(result.sound))


def _write_picture(
    part: Path, suffix: str, result: _Result, kind: str | None, findings: Sequence[Finding]
) -> None:
    from edgeinfer.outputs.drawing import draw_boxes

    if kind is None and result.fed.picture is None:
        raise InputError(
            "Boxes are drawn on the picture that was given, and none was. Give -o a .npz or .json."
        )
    if result.fed.picture is None or kind not in ("boxes", "regions"):
        raise InputError(
            "Only what finds boxes in a picture can be drawn: no form says that of this model. Give --form, "
            "or -o a .npz "
            "or .json."
        )
    drawn = draw_boxes(result.fed.picture, findings)
    drawn.save(part, format="PNG" if suffix == ".png" else "JPEG", quality=92)


def _outputs(result: _Result, kind: str | None, findings: Sequence[Finding]) -> dict[str, Any]:
    facts: dict[str, Any] = {"outputs": {name: json_array(array) for name, array in result.arrays.items()}}
    if kind is not None:
        facts[kind] = plain([asdict(finding) for finding in findings])
    return facts


def _facts(model: Any, result: _Result, kind: str | None, findings: Sequence[Finding]) -> dict[str, Any]:
    statistics = model.statistics()
    return {
        **_outputs(result, kind, findings),
        "seconds": result.seconds,
        "load_seconds": statistics.load_seconds,
        "mode": model.plan.mode,
        "provider": model.plan.provider,
        "provider_reason": model.plan.provider_reason,
        "num_stages": model.plan.num_stages,
        "budget_bytes": statistics.budget_bytes,
        "peak_memory_bytes": statistics.peak_memory_bytes,
        "resident_bytes": statistics.resident_bytes,
        "streamed_bytes": statistics.streamed_bytes,
    }


def _text(result: _Result, kind: str | None, findings: Sequence[Finding]) -> str:
    """What was found, or else a line an output."""
    if kind == "classes":
        return "\n".join(
            f"{finding.score:7.2%}  {finding.number:>5}  {finding.label}" for finding in findings
        )
    if kind is not None:
        lines = [
            f"{box.score:7.2%}  {box.label:<16}  {box.x1:.0f},{box.y1:.0f} to {box.x2:.0f},{box.y2:.0f}"
            for box in findings
        ]
        return "\n".join(lines) or f"No {kind} found."
    return "\n".join(summary(name, array) for name, array in result.arrays.items())


def _closing_line(model: Any, result: _Result) -> str:
    """The numbers of a run in one line."""
    statistics, plan = model.statistics(), model.plan
    parts = [
        f"{result.seconds:.3g} s on {plan.provider}",
        f"peak memory {format_size(statistics.peak_memory_bytes)} of {format_size(statistics.budget_bytes)}",
    ]
    if plan.mode == "streaming":
        parts.append(f"{plan.num_stages} stages")
        parts.append(f"{format_size(statistics.streamed_bytes)} read from disk")
    return ", ".join(parts)
