"""The ONNX engine: a model under ONNX Runtime, within a byte budget."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.budget import process_memory
from edgeinfer.errors import EngineError, InputError
from edgeinfer.onnx.graph import OnnxFile
from edgeinfer.onnx.opening import Opened, open_model
from edgeinfer.onnx.plan import OnnxPlan
from edgeinfer.onnx.ports import Port, check_feeds
from edgeinfer.onnx.stock import StockModel

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

    from edgeinfer.onnx.staged import StagedModel
    from edgeinfer.streams.model_stream import ModelStream

__all__ = ["OnnxModel", "OnnxPlan", "OnnxStatistics", "Port", "open_onnx"]


@dataclass(frozen=True)
class OnnxStatistics:
    """Counters since the model was opened; bytes and seconds."""

    load_seconds: float
    resident_bytes: int  # weights that stay in memory
    streamed_bytes: int  # weights read for one use each
    wait_seconds: float  # computing stood still for the disk
    disk_bytes_per_second: float | None  # while reading; None: nothing was read
    passes: int  # calls of run that gave outputs
    budget_bytes: int
    peak_memory_bytes: int


class OnnxModel:
    """An opened model: `run` it, then close it, or use it as a context manager. One `run` at a time:
    others wait.

    `inputs`, `outputs`: what `run` takes and gives; `metadata`: the file's own key-value pairs; `plan`: how
    it is run, which changes when inputs of new sizes come.
    """

    def __init__(self, file: OnnxFile, opened: Opened, started: float):
        self._runner = opened.runner
        self._running = threading.Lock()
        self.inputs = opened.inputs
        self.outputs = opened.outputs
        self.metadata: Mapping[str, str] = MappingProxyType(dict(file.metadata))
        self._passes = 0
        self._peak = 0
        self._counters: Mapping[str, float] = {}
        self._plan = self._runner.plan
        self._load_seconds = time.perf_counter() - started

    @property
    def plan(self) -> OnnxPlan:
        if self._runner is not None:
            self._plan = self._runner.plan
        return self._plan

    @property
    def mode(self) -> str:
        """How the weights are held: "in-memory" (one stock session) or "streaming" (in stages)."""
        return self.plan.mode

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs by name (None: all of them) for `feeds`, an array for each input.

        Raises InputError where a name, type or shape is not the model's, EngineError where ONNX Runtime
        fails, BudgetError where the input needs more than the budget leaves, ReadError where weights cannot
        be read any more.
        """
        arrays = check_feeds(self.inputs, feeds)
        wanted = self._wanted(outputs)
        with self._running:
            runner = self._opened()
            self._note_peak()
            results = runner.run(arrays, wanted)
            self._passes += 1
        return results

    def run_values(
        self, inputs: Mapping[str, OrtValue], outputs: Mapping[str, OrtValue | None]
    ) -> dict[str, OrtValue]:
        """The `outputs` by name, for inputs that are read where they lie: nothing is checked or copied.

        An output is written into the value that is given for it (which may be an input too, where the
        operators allow it), or into a new one, None. Inputs that have a default (`defaults`) may be left
        out. Raises what `run` raises.
        """
        with self._running:
            runner = self._opened()
            self._note_peak()
            results = runner.run_values(inputs, outputs)
            self._passes += 1
        return results

    def make_room(
        self, passes: Sequence[Mapping[str, OrtValue]], outputs: Mapping[str, OrtValue | None]
    ) -> int:
        """See to it that passes with these inputs, the largest first, and smaller ones fit the budget; gives
        the bytes that they take besides weights. BudgetError where they do not fit. What is in bound values
        may change.
        """
        with self._running:
            self._note_peak()
            return self._opened().make_room(passes, outputs)

    @property
    def defaults(self) -> frozenset[str]:
        """Names of inputs that have a value where none is given; `inputs` does not list them."""
        return self._opened().defaults

    def _note_peak(self) -> None:
        """A pass that is measured starts the peak anew."""
        self._peak = max(self._peak, process_memory().peak_rss_bytes)

    def _opened(self) -> StockModel | StagedModel:
        if self._runner is None:
            raise EngineError("The model is closed. Open it again.")
        return self._runner

    @property
    def session(self) -> InferenceSession | None:
        """The stock session that holds all of the model, for binding its inputs and outputs; None where it
        is run in stages, and once it is closed.
        """
        return self._runner.session if isinstance(self._runner, StockModel) else None

    def stream(
        self, *, form: str | None = None, state: Mapping[str, str] | None = None, rate: int | None = None
    ) -> ModelStream:
        """The model on a stream, its state carried from step to step: see
        edgeinfer.streams.model_stream.ModelStream.

        `form`: the name of what describes the model, or a JSON file (None: found by its inputs and outputs);
        `state`: {input: output}, where it is not found by itself; `rate`: samples a second. Raises
        InputError.
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

    def read_pass(self) -> int:
        """Read the streamed weights of one pass without computing, and give the bytes; 0 where nothing is
        streamed.
        """
        with self._running:
            return self._runner.read_pass() if self._runner is not None else 0

    def statistics(self) -> OnnxStatistics:
        if self._runner is not None:
            self._counters = self._runner.counters()
        counters = self._counters
        read, busy = int(counters.get("read_bytes", 0)), counters.get("busy_seconds", 0.0)
        return OnnxStatistics(
            load_seconds=self._load_seconds,
            resident_bytes=self.plan.ledger.entries.get("resident_weights", 0),
            streamed_bytes=read - int(counters.get("resident_bytes", 0)),
            wait_seconds=counters.get("wait_seconds", 0.0),
            disk_bytes_per_second=read / busy if busy else None,
            passes=self._passes,
            budget_bytes=self.plan.budget_bytes,
            peak_memory_bytes=max(self._peak, process_memory().peak_rss_bytes),
        )

    def close(self) -> None:
        """Give back all memory, threads and files. `statistics` stay."""
        with self._running:
            runner, self._runner = self._runner, None
            if runner is not None:
                self._plan, self._counters = runner.plan, runner.counters()
                runner.close()

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
    progress: Callable[[float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> OnnxModel:
    """Open the ONNX model at `path` so that the process stays within `memory` (bytes, "2GiB", "50%"; None:
    what is free).

    `threads`: computing threads; `provider`: "cpu", "cuda" or "tensorrt" (None: the best that is there);
    `progress`: called with the finished fraction of what has to be done first; `say`: called with a sentence
    for people before a model is prepared. Raises ModelFileError, BudgetError, EngineError.
    """
    started = time.perf_counter()
    options = {"memory": memory, "threads": threads, "provider": provider, "progress": progress, "say": say}
    file, opened = open_model(path, **options)
    return OnnxModel(file, opened, started)
