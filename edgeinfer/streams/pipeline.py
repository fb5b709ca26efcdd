"""Several models on one stream: a later one runs only where an earlier one asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms import Form, GateRule, find_form, read_form
from edgeinfer.outputs.reading import Finding, Reader
from edgeinfer.streams.description import GateDescription, StageDescription, check_order
from edgeinfer.streams.gate import Gate
from edgeinfer.streams.model_stream import ModelStream, Step

SMALL_MODEL_BYTES = 8 << 20


@dataclass(frozen=True)
class StageStep:
    """A step of the stage `name`; `findings`: what it means (boxes, classes), where the model's form says
    so."""

    name: str
    step: Step
    findings: Sequence[Finding] = ()


class _SoundStage:
    """A model on a sound, behind a gate or not. What it makes of the sound has the length of what it was
    given."""

    def __init__(self, description: StageDescription, stream: ModelStream):
        self.name, self.stream = description.name, stream
        self._pass = description.closed == "pass"
        self._held = np.zeros(0, np.float32)  # waits for the gate
        self._running = False

    def feed(self, samples: np.ndarray) -> list[Step]:
        return self.stream.feed(samples)

    def hold(self, samples: np.ndarray) -> None:
        self._held = np.concatenate([self._held, samples])

    def through(self, stretches: Sequence[tuple[int, bool]]) -> list[Step]:
        """What was held, as the gate has decided. Each open stretch begins with a fresh state."""
        steps: list[Step] = []
        for count, is_open in stretches:
            samples, self._held = self._held[:count], self._held[count:]
            if is_open:
                if not self._running:
                    self.stream.forget_state()
                self._running = True
                steps += self.stream.feed(samples)
            else:
                self._running = False
                steps += self.stream.skip(count, samples if self._pass else None)
        return steps


class Pipeline:
    """Stages over one stream, all on sound or all on frames. Made by `open_pipeline`; close it."""

    def __init__(self, stages: Sequence[tuple[StageDescription, ModelStream, Reader]]):
        self._described = {description.name: description for description, _, _ in stages}
        self.streams = {description.name: stream for description, stream, _ in stages}
        self._readers = {description.name: reader for description, _, reader in stages}
        sounds = [stream.framing is not None for stream in self.streams.values()]
        if any(sounds) != all(sounds):
            raise InputError("Models on a sound and models on frames cannot be in one pipeline.")
        self.on_sound = all(sounds)
        rates = {stream.rate for stream in self.streams.values()}
        if len(rates) > 1:
            raise InputError(
                "The models take sounds of different rates: "
                f"{', '.join(f'{rate:,}' for rate in sorted(rates))}."
            )
        self.rate = rates.pop()
        self._sound = (
            [_SoundStage(description, stream) for description, stream, _ in stages] if self.on_sound else []
        )
        self.gates = {
            name: self._make_gate(description.gate)
            for name, description in self._described.items()
            if self.on_sound and description.gate is not None
        }

    @property
    def sound_source(self) -> ModelStream | None:
        """The stream whose sound is the pipeline's: the last one that makes any."""
        return next((stream for stream in reversed(self.streams.values()) if stream.makes_sound), None)

    def _make_gate(self, gate: GateDescription) -> Gate:
        form = self.streams[gate.by].form
        rule = form.gate if form else None
        if rule is None:
            raise InputError(
                f"Stage {gate.by!r} has no number to ask with: its form names none. Give it a --form with a "
                "gate."
            )
        if gate.above is not None:
            rule = replace(rule, above=gate.above, below=gate.below if gate.below is not None else gate.above)
        elif gate.below is not None:
            rule = replace(rule, below=gate.below)
        return Gate(rule, round(gate.hold * self.rate), round(gate.lead * self.rate))

    def feed(self, data: Any) -> list[StageStep]:
        """The steps of all stages that `data` (samples, a picture or an array) completes."""
        return self._feed_sound(data) if self.on_sound else self._feed_frame(data)

    def _feed_sound(self, samples: np.ndarray) -> list[StageStep]:
        return self._sounds(
            lambda stage: stage.feed(samples), lambda stage: stage.hold(samples), finish=False
        )

    def finish(self) -> list[StageStep]:
        """The steps of what is left at the end."""
        if not self.on_sound:
            return []
        return self._sounds(lambda stage: stage.stream.finish(), lambda stage: None, finish=True)

    def skip(self, count: int) -> list[StageStep]:
        """`count` samples (or frames) were lost: every stage leaves them out."""
        if not self.on_sound:
            for stream in self.streams.values():
                stream.skip(count)
            return []
        silence = np.zeros(count, np.float32)
        return self._sounds(
            lambda stage: stage.stream.skip(count), lambda stage: stage.hold(silence), finish=False
        )

    def _sounds(
        self, run: Callable[[_SoundStage], list[Step]], hold: Callable[[_SoundStage], None], finish: bool
    ) -> list[StageStep]:
        done: list[StageStep] = []
        for stage in self._sound:
            gate = self.gates.get(stage.name)
            if gate is None:
                steps = run(stage)
            else:
                hold(stage)
                steps = stage.through(gate.take(finish)) + (stage.stream.finish() if finish else [])
            for other, description in self._described.items():
                if description.gate is not None and description.gate.by == stage.name:
                    for step in steps:
                        self.gates[other].decide(round(step.seconds * self.rate), step.value)
            done += [StageStep(stage.name, step) for step in steps]
        return done

    def _feed_frame(self, data: Any) -> list[StageStep]:
        done: dict[str, StageStep] = {}
        for name, stream in self.streams.items():
            gate = self._described[name].gate
            frame = data if gate is None else self._asked_for(gate, done.get(gate.by), data)
            if frame is None:
                stream.skip(1)
                continue
            step = stream.feed(frame)[0]
            done[name] = StageStep(name, step, self._readers[name].read(step.outputs, step.placement))
        return list(done.values())

    def _asked_for(self, gate: GateDescription, asking: StageStep | None, data: Any) -> Any:
        """What the next model sees; None where nothing asks for it."""
        if asking is None:
            return None
        rule = GateRule("", "", 0.0 if gate.above is None else gate.above)
        found = [
            finding
            for finding in asking.findings
            if finding.score >= rule.above and (not gate.labels or finding.label in gate.labels)
        ]
        if not found:
            return None
        if not gate.crop or not hasattr(found[0], "x1") or isinstance(data, np.ndarray):
            return data
        box = found[0]
        corners = (
            round(box.x1),
            round(box.y1),
            max(round(box.x1) + 1, round(box.x2)),
            max(round(box.y1) + 1, round(box.y2)),
        )
        return data.crop(corners)

    def open_share(self, frames: int) -> dict[str, float]:
        """{gated stage: the part of the stream that it ran on}; `frames`: how many there were, where there is
        no sound."""
        if self.on_sound:
            gates = {name: gate for name, gate in self.gates.items() if gate.samples}
            return {name: gate.open_samples / gate.samples for name, gate in gates.items()}
        gated = [name for name, description in self._described.items() if description.gate is not None]
        return {name: self.streams[name].steps / frames for name in gated} if frames else {}

    def close(self) -> None:
        for stream in self.streams.values():
            stream.model.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_pipeline(
    stages: Sequence[StageDescription],
    *,
    rate: Callable[[], int | None] = lambda: None,
    memory: int | str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Pipeline:
    """Open the models of `stages`, in order. `rate`: gives that of the sound, for models that take several.
    See edgeinfer.engines.onnx.open_onnx for the options; models that are small compute on one thread unless
    `threads` says otherwise. Raises ModelFileError, BudgetError, InputError."""
    from edgeinfer.engines.onnx import open_onnx

    try:
        check_order(stages)
    except ValueError as error:
        raise InputError(f"The pipeline is not right: {error}.") from error
    with contextlib.ExitStack() as opened:
        made = []
        for stage in stages:
            options = {"memory": memory, "threads": threads or _threads(stage.model), "provider": provider}
            model = opened.enter_context(open_onnx(stage.model, say=say, **options))
            form = read_form(stage.form) if stage.form else find_form(model.inputs, model.outputs)
            reader = Reader(model, form, Path(stage.model))
            made.append((stage, ModelStream(model, form, stage.state, _wish(form, rate)), reader))
        pipeline = Pipeline(made)
        opened.pop_all()
        return pipeline


def _wish(form: Form | None, rate: Callable[[], int | None]) -> int | None:
    """The rate that a model is asked to compute at, where it takes several and that of the sound is one."""
    if form is None or form.framing is None or not form.framing.rates:
        return None
    offered = rate()
    return offered if form.framing.takes(offered) else None


def _threads(path: Path) -> int | None:
    """Steps of a small model take less time than it takes to share them out; another thread senses
    meanwhile."""
    try:
        return 1 if path.stat().st_size < SMALL_MODEL_BYTES else None
    except OSError:
        return None
