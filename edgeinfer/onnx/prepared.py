"""What is known of a prepared model: the manifest that lies beside its stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.onnx.cache import MANIFEST
from edgeinfer.onnx.stage_files import StageFiles

FORMAT = 7  # of what is written; another number is another entry of the cache
_FEW_STAGES, _MANY_STAGES = 24, 96
_SMALL_STAGE_BYTES, _LARGE_STAGE_BYTES = 2 << 20, 16 << 20

PortFacts = tuple[str, str, tuple[int | str | None, ...]]


@dataclass(frozen=True)
class Prepared:
    """The stages in order, and the model's own inputs and outputs: (name, ONNX Runtime's word for the
    type, shape).

    `reason`: why there is one stage only, or what else people should know; empty for nothing.
    """

    stages: tuple[StageFiles, ...]
    inputs: tuple[PortFacts, ...]
    outputs: tuple[PortFacts, ...]
    reason: str = ""

    def write(self, folder: Path) -> None:
        values = {
            "stages": [files.as_json() for files in self.stages],
            "inputs": self.inputs,
            "outputs": self.outputs,
            "reason": self.reason,
        }
        (folder / MANIFEST).write_text(json.dumps(values))

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """OSError, ValueError, KeyError or TypeError where there is none that can be used."""
        values = json.loads((folder / MANIFEST).read_text())
        inputs, outputs = (
            tuple((name, kind, tuple(shape)) for name, kind, shape in values[key])
            for key in ("inputs", "outputs")
        )
        return cls(tuple(map(StageFiles.from_json, values["stages"])), inputs, outputs, str(values["reason"]))


def default_stage_bytes(weights_bytes: int) -> int:
    """Small stages need a small ring, but each one costs a session and a little time."""
    few = min(_LARGE_STAGE_BYTES, max(_SMALL_STAGE_BYTES, weights_bytes // _FEW_STAGES))
    return max(few, weights_bytes // _MANY_STAGES)
