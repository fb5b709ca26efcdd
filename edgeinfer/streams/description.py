"""A pipeline of models as a small JSON file: what runs, and what has to ask for it.

    {"stages": [
      {"model": "silero_vad.onnx", "name": "speech"},
      {"model": "gtcrn.onnx", "gate": {"by": "speech", "above": 0.5, "hold": 0.3, "lead": 0.1}, "closed":
      "silence"}
    ]}

Paths are relative to the file. See StageDescription and GateDescription for the keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edgeinfer.errors import InputError

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class GateDescription:
    """`by`: the name of the stage that asks. `above`, `below`: of its number (None: as its form says); or
    `labels`: of its boxes or classes, any of which asks (none: every box does). `hold`, `lead`: seconds a
    gate stays open longer and opens earlier. `crop`: the next model sees the box that asks, not the whole
    picture."""

    by: str
    above: float | None = None
    below: float | None = None
    labels: tuple[str, ...] = ()
    hold: float = 0.3
    lead: float = 0.0
    crop: bool = False

    def __post_init__(self) -> None:
        if self.hold < 0 or self.lead < 0:
            raise ValueError(f"expected hold and lead of 0 seconds or more, got {self.hold} and {self.lead}")


@dataclass(frozen=True)
class StageDescription:
    """`closed`: what is heard of a sound while the gate is shut: "silence", or "pass" for the sound as it
    came."""

    model: Path
    name: str
    form: str | None = None
    state: Mapping[str, str] = field(default_factory=dict)
    gate: GateDescription | None = None
    closed: str = "silence"

    def __post_init__(self) -> None:
        if self.closed not in ("silence", "pass"):
            raise ValueError(f'expected closed to be "silence" or "pass", got {self.closed!r}')


def read_pipeline(path: Path) -> list[StageDescription]:
    """The stages of a pipeline's file, in order. Raises InputError."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is too large for the description of a pipeline.")
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The pipeline {path} cannot be read as JSON: {error}.") from error
    try:
        if not isinstance(values, dict) or set(values) != {"stages"} or not values["stages"]:
            raise ValueError('expected {"stages": [...]} with at least one stage')
        stages = [_stage(entry, path.parent) for entry in values["stages"]]
        check_order(stages)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"The pipeline {path} is not right: {error}.") from error
    return stages


def _stage(entry: Mapping[str, Any], folder: Path) -> StageDescription:
    entry = dict(entry)
    _known(entry, StageDescription, "a stage")
    if not isinstance(entry.get("model"), str):
        raise ValueError("a stage lacks the path of its model")
    entry["model"] = folder / entry["model"]
    entry.setdefault("name", entry["model"].stem)
    if entry.get("gate") is not None:
        gate = dict(entry["gate"])
        _known(gate, GateDescription, "a gate")
        if "by" not in gate:
            raise ValueError('a gate lacks "by", the name of the stage that asks')
        gate["labels"] = tuple(gate.get("labels", ()))
        entry["gate"] = GateDescription(**gate)
    return StageDescription(**entry)


def _known(entry: Mapping[str, Any], kind: type, what: str) -> None:
    names = [known.name for known in fields(kind)]
    if unknown := set(entry) - set(names):
        raise ValueError(f"{what} has unknown keys {sorted(unknown)}; known are {sorted(names)}")


def check_order(stages: Sequence[StageDescription]) -> None:
    """Raise ValueError where names repeat, or a gate names a stage that does not come before."""
    before: list[str] = []
    for stage in stages:
        if stage.name in before:
            raise ValueError(f'two stages have the name {stage.name!r}; give one of them a "name" of its own')
        if stage.gate is not None and stage.gate.by not in before:
            raise ValueError(
                f"stage {stage.name!r} waits for {stage.gate.by!r}, which is not a stage before it "
                f"({', '.join(before) or 'there is none'})"
            )
        before.append(stage.name)
