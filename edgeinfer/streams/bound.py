"""Steps of one stock session whose inputs, outputs and state are bound once: what a step costs is the model's
own time.

The state lies in two buffers that take turns, one read and one written, so that a step that fails leaves it
as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnxruntime import InferenceSession, OrtValue


class BoundSteps:
    """Repeats a run of `session` with the same shapes.

    `name`: the input that changes; `feeds`: an array for every input, as the next step needs them; `outputs`:
    what a run gave, whose shapes are those of every run; `state`: {input: output}.
    """

    def __init__(
        self,
        session: InferenceSession,
        name: str,
        feeds: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        state: Mapping[str, str],
    ):
        self._session = session
        self._state = state
        self._data = np.array(feeds[name])
        self._outputs = {
            key: np.empty_like(array) for key, array in outputs.items() if key not in state.values()
        }
        # OrtValues on the CPU are views of the arrays, which have to outlive them.
        self._states = [{key: np.array(feeds[key]) for key in state} for _ in range(2)]
        self._turn = 0
        fixed = {key: np.array(array) for key, array in feeds.items() if key != name and key not in state}
        self._kept = fixed
        shared = {
            key: OrtValue.ortvalue_from_numpy(array) for key, array in {name: self._data, **fixed}.items()
        }
        results = {key: OrtValue.ortvalue_from_numpy(array) for key, array in self._outputs.items()}
        states = [
            {key: OrtValue.ortvalue_from_numpy(array) for key, array in side.items()} for side in self._states
        ]
        self._bindings = []
        for before, after in (states, reversed(states)):
            binding = session.io_binding()
            for key, value in {**shared, **before}.items():
                binding.bind_ortvalue_input(key, value)
            for key, value in results.items():
                binding.bind_ortvalue_output(key, value)
            for key, output in state.items():
                binding.bind_ortvalue_output(output, after[key])
            self._bindings.append(binding)

    def takes(self, data: np.ndarray) -> bool:
        """Whether `data` has the type and shape that the input that changes is bound with."""
        return data.dtype == self._data.dtype and data.shape == self._data.shape

    def run(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs without the state, which is kept. Raises what ONNX Runtime raises; the state is then as
        before."""
        self._data[...] = data
        self._session.run_with_iobinding(self._bindings[self._turn])
        self._turn = 1 - self._turn
        return {key: array.copy() for key, array in self._outputs.items()}

    def current_state(self) -> dict[str, np.ndarray]:
        """{input: the state that the next step would read}"""
        return {key: array.copy() for key, array in self._states[self._turn].items()}
