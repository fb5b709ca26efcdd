"""One model on a stream: its state carried from step to step, its sound cut into steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms import Form, PictureInput, find_form
from edgeinfer.onnx.ports import Port
from edgeinfer.streams.bound import BoundSteps
from edgeinfer.streams.framing import make_frames
from edgeinfer.streams.state import candidates, find_state, zero_state


class Step(NamedTuple):
    """What one step gave. `start_seconds`, `seconds`: the piece of sound that it is about (of a frame: its
    number, 0).

    `outputs`: by name, without the state and without a spectrum that becomes sound. `value`: the number that
    the model's form watches, such as the probability of speech. `left_out`: the model did not see this piece.
    """

    start_seconds: float
    seconds: float
    outputs: Mapping[str, np.ndarray] = MappingProxyType({})
    value: float | None = None
    picture: Any = None
    placement: Any = None
    left_out: bool = False


class ModelStream:
    """Feeds pieces to `model` as they arrive and carries its state.

    A model with a form that has a framing takes samples: float32 arrays of any length, -1 to 1, at `rate`.
    Any other takes one input a step: an array of its type and shape, or a picture (PIL) where it takes
    pictures. `state` is {input: output} where it is not found by itself. `sound` collects what the model
    makes of a sound, if it makes one.
    """

    def __init__(
        self,
        model: Any,
        form: Form | None = None,
        state: Mapping[str, str] | None = None,
        rate: int | None = None,
    ):
        self.model = model
        self.form = form or find_form(model.inputs, model.outputs)
        self.framing = self.form.framing if self.form else None
        self._inputs = {port.name: port for port in model.inputs}
        known = {**(self.form.state if self.form else {}), **(state or {})}
        self.state = find_state(model.inputs, model.outputs, known)
        self._hidden = frozenset(self.state.values())
        self._can_bind = True
        self._watched = self.form.gate.output if self.form and self.form.gate else ""
        self._values = self._fixed_values(rate)
        self.input = self._find_input()
        self.makes_sound = self.framing is not None and self.framing.output is not None
        self.rate = (rate or self.framing.rate) if self.framing else None
        self._frames = make_frames(self.framing, self.rate) if self.framing else None
        self.busy_seconds = 0.0
        self.steps = 0
        self.reset()

    def _fixed_values(self, rate: int | None) -> dict[str, np.ndarray]:
        values = dict(self.form.values) if self.form else {}
        if self.framing and self.framing.rate_input and rate:
            values[self.framing.rate_input] = rate
        ports = self._inputs
        return {
            name: np.full([1] * len(ports[name].shape), value, ports[name].dtype)
            for name, value in values.items()
            if name in ports
        }

    def _find_input(self) -> Port:
        left = [
            port for name, port in self._inputs.items() if name not in self._values and name not in self.state
        ]
        if self.framing:
            if self.framing.input not in self._inputs:
                raise InputError(f"The form wants an input {self.framing.input!r}, which the model has not.")
            left = [port for port in left if port.name != self.framing.input] or [
                self._inputs[self.framing.input]
            ]
            if left[0].name == self.framing.input:
                return left[0]
        elif len(left) == 1:
            return left[0]
        raise InputError(self._unclear(left))

    def _unclear(self, left: Sequence[Port]) -> str:
        if not left:
            return (
                f"All inputs of the model look like state: {', '.join(self.state)}. Name the real pairs with "
                "--state OUTPUT=INPUT."
            )
        lines = []
        for port in left:
            fits = candidates(port, self.model.outputs)
            lines.append(f"{port.name} ({port.describe()}; outputs like it: {', '.join(fits) or 'none'})")
        return (
            "It is unclear which input takes the stream and which are state: "
            + "; ".join(lines)
            + ". Name the pairs "
            "of state with --state OUTPUT=INPUT."
        )

    def reset(self) -> None:
        """Forget everything: the state is zeros again, the next sample is the first."""
        self.forget_state()
        self._position = 0  # samples or frames that were taken
        self._start = 0  # where the sound that is being put together began
        self._restored = 0  # samples of it that were given out
        self._stepped = 0  # steps of it
        self._sound: list[np.ndarray] = []
        if self._frames:
            self._frames.reset()

    def take_sound(self) -> np.ndarray:
        """The samples that the model made since the last call."""
        sound, self._sound = self._sound, []
        return np.concatenate(sound) if sound else np.zeros(0, np.float32)

    def feed(self, data: Any) -> list[Step]:
        """The steps that `data` completes. Raises InputError for what the model cannot take, EngineError."""
        start = time.perf_counter()
        try:
            if self._frames is None:
                return [self._one(data)]
            samples = _samples(data)
            self._position += len(samples)
            return self._through(self._frames.push(samples))
        finally:
            self.busy_seconds += time.perf_counter() - start

    def finish(self) -> list[Step]:
        """The steps of what is left at the end of a sound; the next sample begins another one. The state is
        kept."""
        if self._frames is None:
            return []
        start = time.perf_counter()
        steps = self._through(self._frames.finish())
        self._frames.reset()
        self._start, self._restored, self._stepped = self._position, 0, 0
        self.busy_seconds += time.perf_counter() - start
        return steps

    def skip(self, count: int, sound: np.ndarray | None = None) -> list[Step]:
        """Leave out `count` samples (or frames): the model does not see them, its sound is `sound` there, or
        silence."""
        steps = self.finish()
        if self._frames is not None:
            if self.makes_sound:
                self._sound.append(np.zeros(count, np.float32) if sound is None else sound)
            steps.append(Step(self._position / self.rate, count / self.rate, left_out=True))
        self._position += count
        self._start = self._position
        return steps

    def forget_state(self) -> None:
        """The next step is computed as the first one was; the position is kept."""
        self._first = {name: zero_state(self._inputs[name]) for name in self.state}
        self._feeds = {**self._values, **self._first}
        self._bound: BoundSteps | None = None

    def over(self, pieces: Iterable[Any], late: str = "wait", depth: int = 32) -> Iterator[Step]:
        """The steps for `pieces`, which a thread of its own takes while steps are computed. See
        edgeinfer.streams.feeder. Pieces of a sound that wait are fed together.
        """
        from edgeinfer.streams.feeder import Feeder

        with Feeder(pieces, late=late, depth=depth) as feeder:
            for batch in feeder.batches():
                if batch[0].missed:
                    yield from self.skip(batch[0].missed)
                if self._frames is not None and not any(piece.missed for piece in batch[1:]):
                    yield from self.feed(np.concatenate([_samples(piece.data) for piece in batch]))
                    continue
                yield from self.feed(batch[0].data)
                for piece in batch[1:]:
                    if piece.missed:
                        yield from self.skip(piece.missed)
                    yield from self.feed(piece.data)
            if feeder.missed_at_end:
                yield from self.skip(feeder.missed_at_end)
        yield from self.finish()

    def _one(self, data: Any) -> Step:
        picture = placement = None
        if not isinstance(data, np.ndarray):
            from edgeinfer.inputs.images import to_input

            forms = self.form.pictures if self.form else {}
            form = forms.get(self.input.name) or forms.get("*") or PictureInput()
            picture = data
            data, placement = to_input(data, self.input, form)
        outputs = self._step(data)
        self._position += 1
        return Step(float(self._position - 1), 0.0, outputs, self._watch(outputs), picture, placement)

    def _through(self, frames: list[np.ndarray]) -> list[Step]:
        hop, rate, end = self._frames.hop, self.rate, self._position
        spectrum = self.framing.output if self.makes_sound else None
        steps, spectra = [], []
        at = self._start + self._stepped * hop
        for frame in frames:
            outputs = self._step(frame)
            if spectrum is not None:
                spectra.append(outputs.pop(spectrum))
            seconds = (hop if at + hop <= end else max(0, end - at)) / rate
            steps.append(Step(at / rate, seconds, outputs, self._watch(outputs)))
            at += hop
        self._stepped += len(frames)
        if spectrum is not None:
            sound = self._frames.restore(spectra)[: end - self._start - self._restored]
            self._restored += len(sound)
            self._sound.append(sound)
        return steps

    def _step(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """One run of the model, whose new state is the next one's. The first run of a shape is checked; those
        that follow are bound to it, where one session holds the model."""
        self.steps += 1
        bound = self._bound
        if bound is not None and bound.takes(data) and self.model.session is not None:  # None: it was closed
            try:
                return bound.run(data)
            except (
                Exception
            ):  # outputs change their shapes, or the model fails: then the checked run says why
                self._can_bind = False
        self._unbind()
        feeds = self._feeds
        feeds[self.input.name] = data
        outputs = self.model.run(feeds)
        for name, output in self.state.items():
            feeds[name] = outputs[output]
        session = self.model.session
        if (
            self._can_bind
            and session is not None
            and all(array.dtype != object for array in outputs.values())
        ):
            if all(feeds[name].shape == self._first[name].shape for name in self.state):
                self._bound = BoundSteps(session, self.input.name, feeds, outputs, self.state)
        return {name: array for name, array in outputs.items() if name not in self._hidden}

    def _unbind(self) -> None:
        if self._bound is not None:
            self._feeds.update(self._bound.current_state())
            self._bound = None

    def _watch(self, outputs: Mapping[str, np.ndarray]) -> float | None:
        watched = outputs.get(self._watched)
        return None if watched is None else watched.item(0)


def _samples(data: Any) -> np.ndarray:
    samples = np.asarray(data)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise InputError(
            f"Expected samples as a float array in one dimension, got {samples.dtype} {list(samples.shape)}. "
            "Mix the channels, and divide whole numbers by their range."
        )
    return samples.astype(np.float32, copy=False)
