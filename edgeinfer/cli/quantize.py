"""`edgeinfer quantize`: make a GGUF model smaller, and say what that costs."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.budget import format_size, parse_size
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.cli.termination import termination_interrupts
from edgeinfer.errors import ExportError

if TYPE_CHECKING:
    from edgeinfer.exporters.auto_bits import Choice, Chooser
    from edgeinfer.exporters.curve import Point
    from edgeinfer.exporters.importance import Importance
    from edgeinfer.exporters.perplexity import Perplexity
    from edgeinfer.exporters.quantize import QuantizeReport

AUTO = "auto"
BUNDLED = "bundled page"
_SMALLEST_DRAWN_BITS = 3.5


@dataclass(frozen=True)
class Job:
    """What was asked for, checked."""

    source: Path
    target: Path
    type: str  # a name of QUANT_TYPES, or AUTO
    num_bytes: int | None  # AUTO only
    calibration: Path | None
    importance: Path | None
    check: str | None  # the text to score
    picture: Path | None
    memory: int | None
    requantize: bool
    force: bool


@click.command(
    epilog="""\b
    Examples:
      edgeinfer quantize model-f16.gguf -o model-q4.gguf --quant Q4_K_M
      edgeinfer quantize model-f16.gguf -o model-iq3.gguf --quant IQ3_XXS --calibration text.txt
      edgeinfer quantize model-f16.gguf -o small.gguf --quant auto --size 2GiB --calibration text.txt
      edgeinfer quantize model-f16.gguf -o small.gguf --quant auto --size 30% --calibration text.txt \\
          --check held-out.txt --picture sizes.svg
    """
)
@click.argument("model", type=click.Path())
@click.option(
    "-o", "--output", "target", metavar="FILE", required=True, help="Write the quantized model here."
)
@click.option("--quant", "type_", metavar="TYPE", required=True, help="Q4_K_M, IQ3_S, Q8_0 ..., or auto.")
@click.option("--size", metavar="SIZE", help="With auto, the file's size: 2GiB, or 30% of the source.")
@click.option("--calibration", metavar="FILE", help="Gather an importance matrix from this text.")
@click.option(
    "--importance", metavar="FILE.gguf", help="Read the importance matrix; with --calibration, keep it there."
)
@click.option(
    "--check",
    metavar="[FILE]",
    is_flag=False,
    flag_value=BUNDLED,
    help="Measure perplexity before and after, on this text or on a bundled page.",
)
@click.option("--picture", metavar="FILE.svg", help="With --check, draw perplexity over size for many types.")
@click.option("--requantize", is_flag=True, help="Also where the model is quantized already.")
@click.option("--memory", metavar="SIZE", help="Compute within 2GiB, 50% ... Default: what is free now.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all numbers.")
@termination_interrupts()
def quantize(
    model: str,
    target: str,
    type_: str,
    size: str | None,
    calibration: str | None,
    importance: str | None,
    check: str | None,
    picture: str | None,
    requantize: bool,
    memory: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the GGUF file MODEL in fewer bits a weight.

    TYPE is one of llama.cpp's, or auto: then the bits of each tensor are chosen so that the file has --size
    and loses least on the calibration text, which takes a while. An importance matrix lets quantization round
    where it matters least; types below 3 bits need one. The calibration text should be like what the model
    will read, some 20,000 tokens; that of --check another one.
    """
    job = _job(model, target, type_, size, calibration, importance, check, picture, requantize, memory, force)
    facts = run_job(job)
    click.echo(json.dumps(facts) if as_json else table(facts))


def _job(
    model: str,
    target: str,
    type_: str,
    size: str | None,
    calibration: str | None,
    importance: str | None,
    check: str | None,
    picture: str | None,
    requantize: bool,
    memory: str | None,
    force: bool,
) -> Job:
    """Everything that can be refused before work starts."""
    from edgeinfer.exporters.auto_bits import target_bytes
    from edgeinfer.exporters.quant_types import find_type
    from edgeinfer.exporters.windows import read_text
    from edgeinfer.modelfile import read_model_file

    is_auto = type_.lower() == AUTO
    type_ = AUTO if is_auto else find_type(type_)
    if is_auto and (size is None or calibration is None):
        raise ExportError(
            "--quant auto chooses on a text and for a size: give --calibration FILE and --size 2GiB."
        )
    if size is not None and not is_auto:
        raise ExportError(
            f"--size is for --quant auto; the size of {type_} is what it is. Leave one of them out."
        )
    if picture is not None and check is None:
        raise ExportError("--picture draws perplexity on the text of --check. Give that too.")
    if picture is not None and Path(picture).suffix.lower() != ".svg":
        raise ExportError(f"Pictures are SVG files: expected a name that ends in .svg, found {picture!r}.")
    if Path(model).resolve() == Path(target).resolve():
        raise ExportError(f"{target} is the model itself. Give another -o.")
    text = None
    if check is not None:
        text = read_text(bundled_page() if check == BUNDLED else check)
    return Job(
        source=Path(model),
        target=Path(target),
        type=type_,
        num_bytes=target_bytes(size, read_model_file(model)) if is_auto else None,
        calibration=Path(calibration) if calibration else None,
        importance=Path(importance) if importance else None,
        check=text,
        picture=Path(picture) if picture else None,
        memory=parse_size(memory) if memory else None,
        requantize=requantize,
        force=force,
    )


def bundled_page() -> Path:
    import edgeinfer.exporters

    return Path(edgeinfer.exporters.__file__).parent / "texts" / "page.txt"


def run_job(job: Job) -> dict[str, Any]:
    """Do what `job` says; the numbers that --json prints."""
    return _Run(job).run()


class _Run:
    """Gathers, chooses, quantizes and measures, as the job says."""

    def __init__(self, job: Job):
        self.job = job
        self.importance: Importance | None = None
        self.chooser: Chooser | None = None
        self.choice: Choice | None = None
        self.scores: dict[str, Perplexity] = {}
        self.points: list[Point] = []

    def run(self) -> dict[str, Any]:
        from edgeinfer.exporters.output import Target

        job = self.job
        with ExitStack() as stack:
            # Entered first, so that what cannot be written is known before the work.
            part = stack.enter_context(Target(job.target, job.force))
            kept = drawn = None
            if job.calibration is not None and job.importance is not None:
                kept = stack.enter_context(Target(job.importance, job.force))
            if job.picture is not None:
                drawn = stack.enter_context(Target(job.picture, job.force))
            text = self._weigh(kept)
            if job.type == AUTO:
                self._choose(text)
            report = self._quantize(part, self.importance)
            if job.check is not None:
                self._check(part)
            if drawn is not None:
                self._draw(drawn, text)
        return self._facts(report)

    def _weigh(self, kept: Path | None) -> str | None:
        """The calibration text; the importance matrix is gathered from it, or read."""
        from edgeinfer.exporters.importance import gather_importance, load_importance
        from edgeinfer.exporters.windows import read_text

        job = self.job
        if job.calibration is None:
            if job.importance is not None:
                self.importance = load_importance(job.importance)
            return None
        text = read_text(job.calibration)
        with ProgressLine("Gathering the importance matrix") as progress:
            self.importance = gather_importance(
                job.source, text, memory=job.memory, origin=job.calibration.name, progress=progress
            )
        if kept is not None:
            self.importance.save(kept)
        return text

    def _choose(self, text: str) -> None:
        num_bytes = self.job.num_bytes
        if self.job.picture is not None:  # which shows smaller files too
            num_bytes = min(num_bytes, self._smallest_drawn())
        self.chooser = self._measure(text, num_bytes)
        self.choice = self.chooser.choose(self.job.num_bytes)

    def _smallest_drawn(self) -> int:
        from edgeinfer.modelfile import read_model_file

        return int(_SMALLEST_DRAWN_BITS * read_model_file(self.job.source).num_parameters / 8)

    def _measure(self, text: str, num_bytes: int) -> Chooser:
        from edgeinfer.exporters.auto_bits import measure

        with ProgressLine("Measuring what each tensor loses") as progress:
            return measure(
                self.job.source,
                text,
                self.importance,
                num_bytes=num_bytes,
                requantize=self.job.requantize,
                progress=progress,
            )

    def _quantize(self, target: Path, importance: Importance | None) -> QuantizeReport:
        from edgeinfer.exporters.quantize import quantize_gguf

        with ProgressLine("Quantizing") as progress:
            return quantize_gguf(
                self.job.source,
                target,
                self.choice.mixture if self.choice else self.job.type,
                importance=importance,
                tensor_types=self.choice.types if self.choice else None,
                memory=self.job.memory,
                requantize=self.job.requantize,
                progress=progress,
            )

    def _check(self, part: Path) -> None:
        from edgeinfer.exporters.perplexity import perplexity

        files = {"before": self.job.source, "after": part}
        with tempfile.TemporaryDirectory(prefix=".edgeinfer-", dir=self.job.target.parent) as scratch:
            if self.importance is not None and self.choice is None:
                files["without_importance"] = plain = Path(scratch) / "plain.gguf"
                try:
                    self._quantize(plain, None)
                except ExportError:  # a type that needs the matrix
                    del files["without_importance"]
            for name, path in files.items():
                with ProgressLine(f"Perplexity {name.replace('_', ' ')}") as progress:
                    self.scores[name] = perplexity(
                        path, self.job.check, memory=self.job.memory, progress=progress
                    )

    def _draw(self, drawn: Path, text: str | None) -> None:
        from edgeinfer.exporters.curve import draw_curve, measure_curve
        from edgeinfer.modelfile import read_model_file

        job, file = self.job, read_model_file(self.job.source)
        if self.chooser is None and text is not None:
            self.chooser = self._measure(text, self._smallest_drawn())
        with ProgressLine("Measuring other types") as progress:
            self.points = measure_curve(
                job.source,
                job.check,
                self.importance,
                self.chooser,
                job.target.parent,
                requantize=job.requantize,
                memory=job.memory,
                progress=progress,
            )
        svg = draw_curve(file.name, file.file_bytes, self.scores["before"], self.points)
        drawn.write_text(svg, encoding="utf-8")

    def _facts(self, report: QuantizeReport) -> dict[str, Any]:
        job, importance = self.job, self.importance
        facts: dict[str, Any] = {
            "source": str(job.source),
            "target": str(job.target),
            "type": job.type,
            "source_bytes": report.source_bytes,
            "target_bytes": report.target_bytes,
            "source_bits_per_weight": report.source_bits_per_weight,
            "bits_per_weight": report.bits_per_weight,
            "tensors": report.tensors,
            "seconds": report.seconds,
        }
        if importance is not None:
            facts["importance"] = {
                "origin": importance.origin,
                "tokens": importance.tokens,
                "tensors": len(importance.sums),
                "unused_experts": importance.unused_experts(),
                "quantized_without": list(report.without_importance or ()),
            }
        if self.choice is not None:
            facts["size_asked_for"] = job.num_bytes
            facts["predicted_divergence"] = self.choice.divergence
        if self.scores:
            facts["perplexity"] = {name: _score(score) for name, score in self.scores.items()}
        if self.points:
            facts["curve"] = [
                {"series": p.series, "label": p.label, "bytes": p.num_bytes, **_score(p.perplexity)}
                for p in self.points
            ]
        return facts


def _score(score: Perplexity) -> dict[str, float]:
    return {"value": score.value, "error": score.error, "tokens": score.tokens}


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    kinds: dict[str, int] = {}
    for kind in facts["tensors"].values():
        kinds[kind] = kinds.get(kind, 0) + 1
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
    lines = [
        _size_line(facts["source"], facts["source_bytes"], facts["source_bits_per_weight"]),
        _size_line(facts["target"], facts["target_bytes"], facts["bits_per_weight"]),
        f"Tensors: {counts}",
    ]
    if "importance" in facts:
        lines.append(_importance_line(facts["importance"]))
    if "predicted_divergence" in facts:
        lines.append(f"Predicted divergence: {facts['predicted_divergence']:.4f} nats a token")
    if "perplexity" in facts:
        scores = facts["perplexity"]
        pairs = [
            f"{s['value']:.4f} ± {s['error']:.4f} {name.replace('_', ' ')}" for name, s in scores.items()
        ]
        lines.append(f"Perplexity on {scores['before']['tokens']:,} tokens: {', '.join(pairs)}")
    return "\n".join(lines)


def _size_line(path: str, num_bytes: int, bits: float) -> str:
    return f"{path}: {format_size(num_bytes)}, {bits:.2f} bits a weight"


def _importance_line(importance: dict[str, Any]) -> str:
    line = f"Importance from {importance['origin']}: {importance['tokens']:,} tokens"
    line += f", {importance['tensors']} tensors"
    if importance["unused_experts"]:
        line += f", {importance['unused_experts']} experts never used (a longer text may reach them)"
    return line
