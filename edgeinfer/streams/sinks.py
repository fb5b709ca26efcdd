"""Where the results of a stream go: a WAV file, a line of JSON a step, or arrays in a .npz file."""

from __future__ import annotations

import json
import wave
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.outputs.arrays import plain, write_npz
from edgeinfer.outputs.reading import Finding
from edgeinfer.streams.gate import Gate
from edgeinfer.streams.pipeline import Pipeline, StageStep

SMALL = 64  # numbers of an output that are written into a line


def pcm16(samples: np.ndarray) -> bytes:
    """Samples from -1 to 1 as 16-bit little-endian PCM; louder ones are cut."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes()


class WavSink:
    """The sound that the pipeline makes, as 16-bit PCM, mono."""

    def __init__(self, path: Path, pipeline: Pipeline):
        self._stream = pipeline.sound_source
        if self._stream is None:
            raise InputError(
                "None of the models makes sound, so there is nothing for a .wav file. Give -o a .jsonl or "
                ".npz."
            )
        self._pipeline = pipeline
        self._file = wave.open(str(path), "wb")
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(self._stream.rate)

    def take(self, _steps: list[StageStep]) -> None:
        self._file.writeframesraw(pcm16(self._stream.take_sound()))
        _forget_sound(self._pipeline)

    def close(self) -> None:
        self._file.close()


class JsonSink:
    """A line of JSON a step: `stage`, `time` (or `frame`), the number the form watches by its name, findings,
    and small outputs."""

    def __init__(self, file: TextIO, pipeline: Pipeline, close: bool = False):
        self._file = file
        self._pipeline = pipeline
        self._close = close

    def take(self, steps: list[StageStep]) -> None:
        for step in steps:
            if step.step.outputs:
                self._file.write(json.dumps(plain(describe(step, self._pipeline)), allow_nan=False) + "\n")
        self._file.flush()
        _forget_sound(self._pipeline)

    def close(self) -> None:
        if self._close:
            self._file.close()


def describe(found: StageStep, pipeline: Pipeline) -> dict[str, Any]:
    """What one step gave, as plain JSON."""
    step, stream = found.step, pipeline.streams[found.name]
    facts: dict[str, Any] = {"stage": found.name}
    facts["time" if pipeline.on_sound else "frame"] = (
        round(step.start_seconds, 6) if pipeline.on_sound else int(step.start_seconds)
    )
    if step.picture is not None and "name" in getattr(step.picture, "info", {}):
        facts["picture"] = step.picture.info["name"]
    gate = stream.form.gate if stream.form else None
    if gate is not None and step.value is not None:
        facts[gate.name] = step.value
    if found.findings:
        facts["findings"] = [asdict(finding) for finding in found.findings]
    else:
        left = {name: array for name, array in step.outputs.items() if gate is None or name != gate.output}
        facts["outputs"] = {name: array.tolist() for name, array in left.items() if array.size <= SMALL}
    return {key: value for key, value in facts.items() if value != {}}


def _forget_sound(pipeline: Pipeline) -> None:
    """Nobody listens: what models make of a sound must not pile up."""
    for stream in pipeline.streams.values():
        stream.take_sound()


class TextSink:
    """Lines for people: when a watched number (speech) begins and ends, and what was found in each
    picture."""

    def __init__(self, file: TextIO | None, pipeline: Pipeline):
        self._file = file
        self._pipeline = pipeline
        self._watch = {
            name: Gate(stream.form.gate)
            for name, stream in pipeline.streams.items()
            if pipeline.on_sound and stream.form and stream.form.gate
        }
        self._began: dict[str, float] = {}
        self._at: dict[str, float] = {}

    def take(self, steps: list[StageStep]) -> None:
        for found in steps:
            if found.name in self._watch:
                self._watched(found)
            elif found.findings or found.step.picture is not None:
                self._write(f"{self._frame(found)}: {_shown(found.findings)}")
        _forget_sound(self._pipeline)

    def _watched(self, found: StageStep) -> None:
        step, gate = found.step, self._watch[found.name]
        before = gate.asking
        gate.decide(round(step.seconds * self._pipeline.rate), step.value)
        gate.take(finish=True)
        if gate.asking and not before:
            self._began[found.name] = step.start_seconds
        elif before and not gate.asking:
            self._ended(found.name, step.start_seconds)
        self._at[found.name] = step.start_seconds + step.seconds

    def _ended(self, name: str, end: float) -> None:
        rule = self._pipeline.streams[name].form.gate
        self._write(f"{self._began.pop(name):8.2f} s to {end:8.2f} s  {rule.name}")

    def _frame(self, found: StageStep) -> str:
        picture = getattr(found.step.picture, "info", {}).get("name")
        return f"{picture or int(found.step.start_seconds)}  {found.name}"

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        for name in list(self._began):
            self._ended(name, self._at[name])


def _shown(findings: Sequence[Finding]) -> str:
    return ", ".join(f"{finding.label} {finding.score:.2f}" for finding in findings) or "nothing"


class NpzSink:
    """Every output of every step, stacked; held in memory until the end. Names are STAGE.OUTPUT where stages
    are several."""

    def __init__(self, path: Path, pipeline: Pipeline):
        self._path = path
        self._pipeline = pipeline
        self._arrays: dict[str, list[np.ndarray]] = {}
        self._sound: list[np.ndarray] = []

    def take(self, steps: list[StageStep]) -> None:
        for found in steps:
            for name, array in found.step.outputs.items():
                self._arrays.setdefault(self._name(found.name, name), []).append(array)
        if self._pipeline.sound_source is not None:
            self._sound.append(self._pipeline.sound_source.take_sound())
            _forget_sound(self._pipeline)

    def _name(self, stage: str, output: str) -> str:
        return output if len(self._pipeline.streams) == 1 else f"{stage}.{output}"

    def close(self) -> None:
        arrays: Mapping[str, np.ndarray] = {
            name: _stacked(found, name) for name, found in self._arrays.items()
        }
        if self._sound:
            arrays = {**arrays, "sound": np.concatenate(self._sound)}
        write_npz(self._path, arrays)


def _stacked(arrays: list[np.ndarray], name: str) -> np.ndarray:
    """[steps, ...]: steps of one shape are stacked."""
    if any(array.shape != arrays[0].shape for array in arrays):
        raise InputError(
            f"The shape of output {name!r} changes from step to step: it does not fit a .npz. Give -o a "
            ".jsonl."
        )
    return np.stack(arrays)
