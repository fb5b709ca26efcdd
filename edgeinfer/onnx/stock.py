"""Models that fit the budget: one stock session with stock settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from edgeinfer.budget import Ledger, process_memory
from edgeinfer.errors import ModelFileError
from edgeinfer.onnx.graph import OnnxFile
from edgeinfer.onnx.plan import OnnxPlan
from edgeinfer.onnx.providers import Choice, what_computes
from edgeinfer.onnx.runtime import explained, make_session, session_options
from edgeinfer.onnx.small_weights import read_alone

_MIB = 1 << 20
ACTIVATIONS = 64 * _MIB  # nobody knows them before the first input
_REARRANGED = {"MatMulNBits": 1.25}  # weights that become larger in the form that their kernels want


class StockModel:
    """One session over the whole model."""

    def __init__(self, file: OnnxFile, plan: OnnxPlan, threads: int | None, choice: Choice):
        options = session_options(threads)
        path = file.path
        with explained(path, ModelFileError):
            self.session = make_session(os.fspath(path), options, choice.chain)
        read_alone([data for data in file.paths if data != path])
        found = what_computes(choice, self.session)
        self.plan = replace(plan, provider=found.name, provider_reason=found.reason)
        self._path = path

    def run(self, feeds: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """The `wanted` outputs by name."""
        with explained(self._path):
            return dict(zip(wanted, self.session.run(list(wanted), dict(feeds))))

    def run_values(
        self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue | None]
    ) -> dict[str, ort.OrtValue]:
        """See OnnxModel.run_values."""
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            if value is None:
                binding.bind_output(name)
            else:
                binding.bind_ortvalue_output(name, value)
        with explained(self._path):
            self.session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs()))

    def make_room(
        self, passes: Sequence[Mapping[str, ort.OrtValue]], outputs: Mapping[str, ort.OrtValue | None]
    ) -> int:
        """All of the model is in memory already."""
        return ACTIVATIONS

    @property
    def defaults(self) -> frozenset[str]:
        return frozenset(port.name for port in self.session.get_overridable_initializers())

    def read_pass(self) -> int:
        return 0

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.session = None


def stock_plan(file: OnnxFile, budget_bytes: int, reason: str) -> OnnxPlan:
    """The plan of one stock session, whatever it takes; its ledger says what that is, at the peak."""
    return OnnxPlan("in-memory", budget_bytes, Ledger(stock_entries(file)), reason=reason)


def stock_entries(file: OnnxFile) -> dict[str, int]:
    """Ledger entries of one stock session while it is made, when it takes most.

    Weights beside the graph are mapped and rearranged one by one. Those inside it are read with it, and
    copied.
    """
    inside = sum(tensor.nbytes for tensor in file.tensors if tensor.path == file.path)
    outside = file.weights_bytes - inside
    names = {name for _, name in file.operators}
    larger = max((factor for name, factor in _REARRANGED.items() if name in names), default=1.0)
    largest = max((tensor.nbytes for tensor in file.tensors), default=0)
    return {
        "interpreter": process_memory().rss_bytes,
        "resident_weights": int((inside + outside) * larger),
        "sessions": len(file.skeleton) * 4,
        "activations": ACTIVATIONS,
        "load_peak": inside + largest,
    }
