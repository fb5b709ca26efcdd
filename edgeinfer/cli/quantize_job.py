"""The work of `edgeinfer quantize`: gather, choose, quantize, measure, draw."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.cli.progress import ProgressLine

if TYPE_CHECKING:
    from edgeinfer.exporters.auto_bits import Choice
    from edgeinfer.exporters.curve import Point
    from edgeinfer.exporters.importance import Importance
    from edgeinfer.exporters.perplexity import Perplexity
    from edgeinfer.exporters.quantize import QuantizeReport
    from edgeinfer.exporters.trials import Trial, Trials

AUTO = "auto"
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


def run_job(job: Job) -> dict[str, Any]:
    """Do what `job` says; the numbers that --json prints."""
    return _Run(job).run()


class _Run:
    """Gathers, chooses, quantizes and measures, as the job says."""

    def __init__(self, job: Job):
        self.job = job
        self.folder = job.target.parent  # of what is made on the way
        self.importance: Importance | None = None
        self.trials: Trials | None = None
        self.trial: Trial | None = None
        self.scores: dict[str, Perplexity] = {}
        self.points: list[Point] = []

    def run(self) -> dict[str, Any]:
        from edgeinfer.exporters.output import Target

        job = self.job
        with ExitStack() as stack:
            # Entered first, so that what cannot be written is known before the work.
            part = stack.enter_context(Target(job.target, job.force))
            self.folder = part.parent
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

    @property
    def choice(self) -> Choice | None:
        return self.trial.choice if self.trial else None

    def _choose(self, text: str) -> None:
        from edgeinfer.exporters.trials import best_trial

        num_bytes = self.job.num_bytes
        if self.job.picture is not None:  # which shows smaller files too
            num_bytes = min(num_bytes, self._smallest_drawn())
        self.trials = self._measure(text, num_bytes)
        with ProgressLine("Trying what promises most") as progress:
            self.trial = best_trial(self.trials.run(self.job.num_bytes, progress))

    def _smallest_drawn(self) -> int:
        from edgeinfer.modelfile import read_model_file

        return int(_SMALLEST_DRAWN_BITS * read_model_file(self.job.source).num_parameters / 8)

    def _measure(self, text: str, num_bytes: int) -> Trials:
        from edgeinfer.exporters.auto_bits import measure
        from edgeinfer.exporters.trials import Trials

        job = self.job
        with ProgressLine("Measuring what each tensor loses") as progress:
            chooser = measure(
                job.source,
                text,
                self.importance,
                num_bytes=num_bytes,
                requantize=job.requantize,
                progress=progress,
            )
        return Trials(
            job.source,
            text,
            self.importance,
            chooser,
            self.folder,
            requantize=job.requantize,
            memory=job.memory,
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
        from edgeinfer.exporters.quantize import ImportanceNeeded

        files = {"before": self.job.source, "after": part}
        with tempfile.TemporaryDirectory(prefix=".edgeinfer-", dir=self.folder) as scratch:
            if self.importance is not None and self.choice is None:
                files["without_importance"] = plain = Path(scratch) / "plain.gguf"
                try:
                    self._quantize(plain, None)
                except ImportanceNeeded:
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
        if self.trials is None and text is not None:
            self.trials = self._measure(text, self._smallest_drawn())
        with ProgressLine("Measuring other types") as progress:
            self.points = measure_curve(
                job.source,
                job.check,
                self.importance,
                self.trials.chooser.choose if self.trials else None,
                self.folder,
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
            facts["calibration_loss_difference"] = self.trial.loss.mean
            facts["calibration_loss_difference_error"] = self.trial.loss.error
            facts["stock_type"] = self.trial.stock
        if self.scores:
            facts["perplexity"] = {
                name: _score(score, self.scores["before"]) for name, score in self.scores.items()
            }
        if self.points:
            facts["curve"] = [
                {
                    "series": p.series,
                    "label": p.label,
                    "bytes": p.num_bytes,
                    **_score(p.perplexity, self.scores["before"]),
                }
                for p in self.points
            ]
        return facts


def _score(score: Perplexity, before: Perplexity) -> dict[str, float]:
    facts = {"value": score.value, "error": score.error, "tokens": score.tokens}
    if score is before:
        return facts
    difference = score.difference(before)
    return {**facts, "loss_difference": difference.mean, "loss_difference_error": difference.error}
