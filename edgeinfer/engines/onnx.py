"""The ONNX engine: a model under ONNX Runtime, within a byte budget."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from edgeinfer.budget import Ledger, default_budget, parse_size, process_memory
from edgeinfer.errors import EngineError, InputError, ModelFileError
from edgeinfer.onnx.ports import Port, check_feeds, make_port
from edgeinfer.onnx.runtime import explained, session_options
from edgeinfer.system import default_threads

if TYPE_CHECKING:
    from edgeinfer.streams.model_stream import ModelStream

__all__ = ["OnnxModel", "OnnxPlan", "OnnxStatistics", "Port", "open_onnx"]

Progress = Callable[[float], None]


@dataclass(frozen=True)
class OnnxPlan:
    """How a model is run. `mode`: "in-memory" (one stock session) or "streaming"; `reason`: why, for people."""

    mode: str
    budget_bytes: int
    ledger: Ledger
    num_stages: int = 1
    reason: str = ""


@dataclass(frozen=True)
class OnnxStatistics:
    """Counters since the model was opened; bytes and seconds."""

    load_seconds: float
    resident_bytes: int  # weights that stay in memory
    streamed_bytes: int  # weights read for one use each
    wait_seconds: float  # computing stood still for the disk
    disk_bytes_per_second: float | None  # while reading; None: nothing was read
    passes: int  # calls of run
    budget_bytes: int
    peak_memory_bytes: int


class OnnxModel:
    """An opened model: `run` it, then close it, or use it as a context manager. One `run` at a time.

    `inputs`, `outputs`: what `run` takes and gives; `metadata`: the file's own key-value pairs; `plan`: how it is run.
    """

    def __init__(self, session: ort.InferenceSession, path: str, plan: OnnxPlan, started: float):
        self._session = session
        self._path = path
        self.plan = plan
        self.inputs = tuple(make_port(port.name, port.type, port.shape) for port in session.get_inputs())
        self.outputs = tuple(make_port(port.name, port.type, port.shape) for port in session.get_outputs())
        self.metadata: Mapping[str, str] = MappingProxyType(dict(session.get_modelmeta().custom_metadata_map))
        self._passes = 0
        self._load_seconds = time.perf_counter() - started

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The outputs by name (None: all of them) for `feeds`, an array for each input.

        Raises InputError where a name, type or shape is not the model's, EngineError where ONNX Runtime fails.
        """
        if self._session is None:
            raise EngineError("The model is closed. Open it again.")
        arrays = check_feeds(self.inputs, feeds)
        names = self._wanted(outputs)
        with explained(self._path):
            values = self._session.run(names, arrays)
        self._passes += 1
        return dict(zip(names, values))

    def stream(
        self, *, form: str | None = None, state: Mapping[str, str] | None = None, rate: int | None = None
    ) -> ModelStream:
        """The model on a stream, its state carried from step to step: see edgeinfer.streams.model_stream.ModelStream.

        `form`: the name of what describes the model, or a JSON file (None: found by its inputs and outputs); `state`:
        {input: output}, where it is not found by itself; `rate`: samples a second. Raises InputError.
        """
        from edgeinfer.forms import read_form
        from edgeinfer.streams.model_stream import ModelStream

        return ModelStream(self, read_form(form) if form else None, state, rate)

    def _wanted(self, outputs: Sequence[str] | None) -> list[str]:
        known = [port.name for port in self.outputs]
        for name in outputs or ():
            if name not in known:
                raise InputError(f"The model has no output {name!r}. Its outputs are {', '.join(known)}.")
        return known if outputs is None else list(outputs)

    def statistics(self) -> OnnxStatistics:
        return OnnxStatistics(
            load_seconds=self._load_seconds,
            resident_bytes=self.plan.ledger.entries.get("resident_weights", 0),
            streamed_bytes=0,
            wait_seconds=0.0,
            disk_bytes_per_second=None,
            passes=self._passes,
            budget_bytes=self.plan.budget_bytes,
            peak_memory_bytes=process_memory().peak_rss_bytes,
        )

    def close(self) -> None:
        """Give back all memory, threads and files."""
        self._session = None

    def __enter__(self) -> OnnxModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_onnx(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    provider: str | None = None,
    progress: Progress | None = None,
) -> OnnxModel:
    """Open the ONNX model at `path` so that the process stays within `memory` (bytes, "2GiB", "50%"; None: what is free).

    `threads`: computing threads; `provider`: "cpu", "cuda" or "tensorrt" (None: the best that is there); `progress`:
    called with the finished fraction of what has to be prepared. Raises ModelFileError, BudgetError, EngineError.
    """
    started = time.perf_counter()
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ModelFileError(f"No model file at {path}: expected an .onnx file.")
    budget = default_budget() if memory is None else memory if isinstance(memory, int) else parse_size(memory)
    with explained(path, ModelFileError):
        session = ort.InferenceSession(
            path, session_options(threads or default_threads()), providers=["CPUExecutionProvider"]
        )
    plan = OnnxPlan("in-memory", budget, Ledger({"interpreter": process_memory().rss_bytes}))
    return OnnxModel(session, path, plan, started)
