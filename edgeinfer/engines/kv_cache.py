"""The keys and values of an ONNX decoder between its runs: bound where they lie, never copied by edgeinfer.

A decoder whose attention writes into its cache (GroupQueryAttention with one buffer for past and present) has
buffers of the whole context. Any other gives a longer present than its past was; the present of a run is the
past of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnxruntime as ort

from edgeinfer.errors import ModelFileError
from edgeinfer.onnx.ports import Port


def cache_axis(port: Port) -> int:
    """The axis of `port` that counts tokens: the one behind the batch whose size varies. Raises
    ModelFileError."""
    axes = [axis for axis, size in enumerate(port.shape) if axis and not isinstance(size, int)]
    if len(axes) != 1:
        raise ModelFileError(
            f"The decoder's cache {port.name!r} is {port.describe()}: expected one axis behind the batch "
            "whose size "
            "varies with the tokens."
        )
    return axes[0]


def cache_shape(port: Port, tokens: int) -> list[int]:
    axis = cache_axis(port)
    return [1 if at == 0 else tokens if at == axis else int(size) for at, size in enumerate(port.shape)]


def cache_bytes(ports: Sequence[Port], tokens: int) -> int:
    """Of the whole cache, with `tokens` in it."""
    return sum(prod(cache_shape(port, tokens)) * port.dtype.itemsize for port in ports)


class GrowingCache:
    """Presents become pasts. The model's own Concat makes each present; edgeinfer hands it on as it is."""

    def __init__(self, ports: Sequence[Port], pairs: Mapping[str, str]):
        self._ports = {port.name: port for port in ports}
        self._pairs = pairs
        self.clear()

    def clear(self, length: int = 0) -> None:
        """A cache of `length` tokens, zeros."""
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(cache_shape(port, length), port.dtype))
            for name, port in self._ports.items()
        }

    def inputs(self) -> dict[str, ort.OrtValue]:
        """What a run reads."""
        return dict(self._values)

    def outputs(self) -> dict[str, ort.OrtValue | None]:
        """Where a run writes; None: into values that it makes."""
        return dict.fromkeys(self._pairs[name] for name in self._values)

    def take(self, results: Mapping[str, ort.OrtValue]) -> None:
        """After a run that succeeded."""
        self._values = {name: results[self._pairs[name]] for name in self._values}

    def truncate(self, length: int) -> None:
        if length == 0:
            self.clear()
            return
        for name, value in self._values.items():
            kept = np.take(value.numpy(), range(length), axis=cache_axis(self._ports[name]))
            self._values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(kept))


class SharedCache:
    """One buffer a tensor, as long as the context, bound as past and as present: a run writes the new rows in
    place."""

    def __init__(self, ports: Sequence[Port], pairs: Mapping[str, str], context_length: int):
        self._pairs = pairs
        self._values = {
            port.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros(cache_shape(port, context_length), port.dtype)
            )
            for port in ports
        }

    def clear(self, length: int = 0) -> None:
        """Rows behind the position are not read."""

    def inputs(self) -> dict[str, ort.OrtValue]:
        """What a run reads."""
        return dict(self._values)

    def outputs(self) -> dict[str, ort.OrtValue]:
        """Where a run writes: the same."""
        return {self._pairs[name]: value for name, value in self._values.items()}

    def take(self, results: Mapping[str, ort.OrtValue]) -> None:
        """They are where they belong."""

    def truncate(self, length: int) -> None:
        """Rows behind the position are not read."""
