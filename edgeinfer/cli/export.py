"""`edgeinfer export`: a checkpoint or an ONNX file becomes a model made for streaming."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from edgeinfer.budget import format_size, parse_size
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.cli.termination import termination_interrupts
from edgeinfer.errors import ExportError

_AUTO = "auto"


@dataclass(frozen=True)
class Job:
    """What was asked for, checked. `type`: None for the checkpoint's own."""

    source: Path
    target: Path
    format: str
    type: str | None
    size: str | None
    calibration: Path | None
    check: bool
    memory: int | None
    force: bool


@click.command(
    epilog="""\b
    Examples:
      edgeinfer export Qwen3-0.6B/ -o qwen3.gguf --check
      edgeinfer export Qwen3-0.6B/ -o qwen3-q4.gguf --quant Q4_K_M --calibration text.txt
      edgeinfer export Qwen3-0.6B/ -o qwen3-small.gguf --quant auto --size 500MiB --calibration text.txt
      edgeinfer export detector.onnx -o detector-int8.onnx --quant INT8
    """
)
@click.argument("source", type=click.Path())
@click.option("-o", "--output", "target", metavar="OUT", required=True, help="Write the model here.")
@click.option(
    "--to", "format_", type=click.Choice(["gguf", "onnx"]), help="Default: by the ending of OUT, else gguf."
)
@click.option(
    "--quant",
    metavar="TYPE",
    help="GGUF: F32, BF16, Q4_K_M ..., auto; ONNX: F16, INT8, INT4 ... Default: the source's own.",
)
@click.option(
    "--size", metavar="SIZE", help="With --quant auto, the file's size: 2GiB, or 30% of the floats'."
)
@click.option(
    "--calibration", metavar="FILE", help="Quantize by this text or, for ONNX, .npz files; they are checked too."
)
@click.option(
    "--check", is_flag=True, help="Run source and result on the same input; fail where they differ."
)
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... GGUF takes some 200 MiB.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@termination_interrupts()
def export(as_json: bool, **options: Any) -> None:
    """Turn SOURCE into a model that streams well.

    SOURCE is a checkpoint folder (config.json, safetensors, tokenizer) or an ONNX file.

    GGUF: F32, F16 and BF16 keep the weights, any other TYPE is llama.cpp's, or auto. Tensors begin at pages
    (4096 bytes), in the order in which they are used. Nothing is written where something fails, --check too.
    """
    job = _job(**options)
    facts, check_lines = _export_onnx(job) if job.format == "onnx" else _export_gguf(job)
    click.echo(json.dumps(facts) if as_json else table(facts, check_lines))


def _job(
    source: str,
    target: str,
    format_: str | None,
    quant: str | None,
    size: str | None,
    calibration: str | None,
    check: bool,
    memory: str | None,
    force: bool,
) -> Job:
    """Everything that can be refused before work starts."""
    if source.lower().endswith(".gguf"):
        raise ExportError(
            f"{source} is GGUF already. `edgeinfer quantize` makes it smaller, `edgeinfer layout` lays it "
            "out anew."
        )
    if format_ is None:
        format_ = "onnx" if target.lower().endswith(".onnx") or source.lower().endswith(".onnx") else "gguf"
    if format_ == "gguf" and source.lower().endswith(".onnx"):
        raise ExportError(
            f"{source} is ONNX, which cannot become GGUF. Give a checkpoint folder, or --to onnx."
        )
    if not Path(source).exists():
        raise ExportError(f"{source} does not exist. Expected a checkpoint folder or an ONNX file.")
    if Path(source).resolve() == Path(target).resolve():
        raise ExportError(f"{target} is the source itself. Give another -o.")
    if calibration is not None and not Path(calibration).exists():
        raise ExportError(f"{calibration} does not exist. --calibration wants a text or, for ONNX, data.")
    if format_ == "onnx" and size is not None:
        raise ExportError("--size is for GGUF. Leave it out.")
    type_ = _gguf_type(quant, size, calibration) if format_ == "gguf" else quant
    return Job(
        source=Path(source),
        target=Path(target),
        format=format_,
        type=type_,
        size=size,
        calibration=Path(calibration) if calibration else None,
        check=check,
        memory=parse_size(memory) if memory else None,
        force=force,
    )


def _gguf_type(quant: str | None, size: str | None, calibration: str | None) -> str | None:
    from edgeinfer.exporters.quant_types import find_type
    from edgeinfer.exporters.to_gguf import FLOAT_TYPES

    is_auto = quant is not None and quant.lower() == _AUTO
    type_ = _AUTO if is_auto else find_type(quant) if quant is not None else None
    if is_auto and (size is None or calibration is None):
        raise ExportError(
            "--quant auto chooses on a text and for a size: give --calibration FILE and --size 2GiB."
        )
    if size is not None and not is_auto:
        raise ExportError("--size is for --quant auto. Leave it out, or give that.")
    if calibration is not None and (type_ is None or type_ in FLOAT_TYPES):
        raise ExportError(
            f"{type_ or 'The source’s own type'} needs no --calibration. Leave it out, or give --quant."
        )
    return type_


def _export_gguf(job: Job) -> tuple[dict[str, Any], list[str]]:
    """What --json prints, and what the check says to people."""
    from edgeinfer.exporters.output import Target
    from edgeinfer.exporters.to_gguf import FLOAT_TYPES, export_gguf

    started = time.monotonic()
    direct = job.type is None or job.type in FLOAT_TYPES
    checked: list[str] = []
    output = Target(job.target, job.force)
    if job.check:
        _require_memory(job)
    with output as part:
        with tempfile.TemporaryDirectory(prefix=".edgeinfer-", dir=part.parent) as scratch:
            floats = part if direct else Path(scratch) / "floats.gguf"
            with ProgressLine("Writing") as progress:
                report = export_gguf(
                    job.source,
                    floats,
                    job.type if direct else None,
                    memory=job.memory,
                    progress=progress,
                )
            facts = {"source": str(job.source), "target": str(job.target), **asdict(report)}
            if not direct:
                facts["quantization"] = _quantize(job, floats, part)
                facts["type"] = job.type
        facts["bytes"] = part.stat().st_size
        if job.check:
            facts["check"], checked = _check(job, part)
    facts["export_seconds"], facts["seconds"] = report.seconds, time.monotonic() - started
    return facts, checked


def _quantize(job: Job, floats: Path, part: Path) -> dict[str, Any]:
    """Quantize `floats`, which is removed, to `part`; what `edgeinfer quantize` says, but no names."""
    from edgeinfer.cli.quantize_job import Job as QuantizeJob
    from edgeinfer.cli.quantize_job import run_job

    result = floats.with_name("quantized.gguf")
    facts = run_job(
        QuantizeJob(
            source=floats,
            target=result,
            type=job.type,
            num_bytes=_size_of_weights(job, floats) if job.type == _AUTO else None,
            calibration=job.calibration,
            importance=None,
            check=None,
            picture=None,
            memory=job.memory,
            requantize=False,
            force=False,
        )
    )
    floats.unlink()
    _lay_out(job, result, part)
    return {name: value for name, value in facts.items() if name not in ("source", "target", "type")}


def _size_of_weights(job: Job, floats: Path) -> int:
    """Bytes that --size leaves where each tensor begins at a page."""
    from edgeinfer.exporters.auto_bits import target_bytes
    from edgeinfer.exporters.layout import ALIGNMENT
    from edgeinfer.modelfile import read_model_file

    file = read_model_file(floats)
    return target_bytes(job.size, file) - ALIGNMENT * (len(file.tensors) + 1)


def _lay_out(job: Job, quantized: Path, part: Path) -> None:
    """llama.cpp does not keep the alignment when it quantizes."""
    from edgeinfer.exporters.layout import lay_out

    aligned = quantized.with_name("aligned.gguf")
    with ProgressLine("Laying out") as progress:
        lay_out(quantized, aligned, memory=job.memory, merge=False, progress=progress)
    os.replace(aligned, part)


def _export_onnx(job: Job) -> tuple[dict[str, Any], list[str]]:
    """What --json prints, and what the check says to people."""
    from edgeinfer.exporters.onnx_export import export_onnx
    from edgeinfer.exporters.onnx_memory import require_memory

    if job.memory is not None:
        require_memory(job.source, job.type, job.memory)
    started = time.monotonic()
    facts: dict[str, Any] = {"source": str(job.source), "target": str(job.target)}
    checked: list[str] = []
    checking = 0.0
    if job.check:
        _require_memory(job)
    with ProgressLine("Writing") as progress:

        def check(result: Path) -> None:
            nonlocal checking
            progress.done()
            begun = time.monotonic()
            facts["check"], lines = _check(job, result)
            checked.extend(lines)
            checking = time.monotonic() - begun

        report = export_onnx(
            job.source,
            job.target,
            quant=job.type,
            calibration=None if _only_checks(job) else job.calibration,
            force=job.force,
            check=check if job.check else None,
            progress=progress,
        )
    seconds = {"export_seconds": report.seconds - checking, "seconds": time.monotonic() - started}
    return {**facts, **asdict(report), **seconds}, checked


def _require_memory(job: Job) -> None:
    """What a check lacks is said before an hour of writing, not after it."""
    from edgeinfer.exporters.check import require_memory

    require_memory(job.source, job.memory)


def _only_checks(job: Job) -> bool:
    """Whether --calibration has inputs for --check of an ONNX file and for nothing else."""
    from edgeinfer.exporters.onnx_export import STATIC_FORMS, find_quant

    is_static = job.type is not None and find_quant(job.type) in STATIC_FORMS
    return job.check and job.source.is_file() and not is_static


def _check(job: Job, result: Path) -> tuple[dict[str, Any], list[str]]:
    """What was compared, for --json and for people. Raises ExportError where the two differ too much."""
    from edgeinfer.exporters.check import check

    with ProgressLine("Checking") as progress:
        samples = job.calibration if job.format == "onnx" and job.source.is_file() else None
        report = check(job.source, result, samples=samples, memory=job.memory, progress=progress)
    if not report.passed:
        raise ExportError("\n".join(["The check failed, so nothing was written.", *report.lines()]))
    return report.as_dict(), report.lines()


def table(facts: dict[str, Any], check_lines: list[str]) -> str:
    """The facts for people."""
    lines = [
        f"{facts['target']}: {facts['architecture']}, {facts['type']}, {facts['tensors']:,} tensors, "
        f"{facts['parameters']:,} parameters, {format_size(facts['bytes'])} in {facts['seconds']:.1f} s"
    ]
    if "quantization" in facts:
        lines.append(_quantization_line(facts["quantization"]))
    else:
        lines[0] += f" ({format_size(round(facts['bytes'] / max(facts['export_seconds'], 1e-9)))}/s)"
    if check_lines:
        lines += [f"Checked {check_lines[0]}", *check_lines[1:]]
    return "\n".join(lines + [f"Note: {note}." for note in facts["notes"]])


def _quantization_line(facts: dict[str, Any]) -> str:
    line = (
        f"{facts['bits_per_weight']:.2f} bits a weight, from {format_size(facts['source_bytes'])} of floats"
    )
    if "importance" in facts:
        line += f", by the importance that {facts['importance']['tokens']:,} tokens of calibration gave"
    if "predicted_divergence" in facts:
        line += f"; predicted divergence {facts['predicted_divergence']:.4f} nats a token"
    return line
