"""The inputs and outputs of a model, and whether what is fed to it fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeinfer.errors import InputError, ModelFileError

#: ONNX Runtime's names -> (name of the type for people, numpy dtype). Strings are arrays of Python objects.
_TYPES = {
    "float": "float32",
    "double": "float64",
    "string": "string",
    **{name: name for name in ("float16", "bool")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Port:
    """One input or output: a tensor. `shape`: sizes, names of sizes that may vary, None for those without
    a name.
    """

    name: str
    dtype: np.dtype
    type_name: str  # "float32", "int64", "string"...
    shape: tuple[int | str | None, ...]

    def describe(self) -> str:
        """For people: "float32 [batch, 3, 224, 224]"."""
        return f"{self.type_name} {show_shape(self.shape)}"


def show_shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def make_port(name: str, kind: str, shape: Sequence[object]) -> Port:
    """From ONNX Runtime's words, such as kind "tensor(float)". ModelFileError for what is not a tensor of
    numbers or text.
    """
    inner = kind.removeprefix("tensor(").removesuffix(")")
    if not kind.startswith("tensor(") or inner not in _TYPES:
        raise ModelFileError(
            f"The model's input or output {name!r} is a {kind}, which cannot be given to it or taken from it "
            "here. "
            f"Expected a tensor of one of {', '.join(sorted(set(_TYPES.values())))}."
        )
    type_name = _TYPES[inner]
    dtype = np.dtype(object if type_name == "string" else type_name)
    sizes = tuple(size if isinstance(size, (int, str)) else None for size in shape)
    return Port(name, dtype, type_name, sizes)


def stored_ports(ports: Sequence[tuple[str, str, Sequence[object]]]) -> list[Port]:
    """Of OnnxFile's (name, type, shape), as they are before a session is made."""
    words = {type_name: word for word, type_name in _TYPES.items()}
    return [make_port(name, f"tensor({words.get(kind, kind)})", shape) for name, kind, shape in ports]


def check_feeds(ports: Sequence[Port], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds as C-ordered arrays. InputError, with what was expected and found, where they do not fit
    the inputs.
    """
    names = [port.name for port in ports]
    for name in feeds:
        if name not in names:
            raise InputError(f"The model has no input {name!r}. Its inputs are {_list(ports)}.")
    missing = [port for port in ports if port.name not in feeds]
    if missing:
        raise InputError(f"Expected a value for every input, found none for {_list(missing)}.")
    return {port.name: _check(port, feeds[port.name]) for port in ports}


def _list(ports: Sequence[Port]) -> str:
    return ", ".join(f"{port.name} ({port.describe()})" for port in ports) or "none"


def _check(port: Port, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray) and not np.isscalar(value):
        raise InputError(f"Input {port.name!r}: expected a numpy array, got {type(value).__name__}.")
    array = np.asarray(value)
    if port.type_name == "string":
        if array.dtype.kind not in "OUST":
            raise InputError(f"Input {port.name!r}: expected text, got {array.dtype}.")
        array = array.astype(object)
    elif array.dtype != port.dtype:
        raise InputError(
            f"Input {port.name!r}: expected type {port.type_name}, got {array.dtype}. "
            f"Convert it with .astype({port.type_name!r})."
        )
    fits = len(array.shape) == len(port.shape) and all(
        not isinstance(size, int) or size == found for size, found in zip(port.shape, array.shape)
    )
    if not fits:
        raise InputError(
            f"Input {port.name!r}: expected shape {show_shape(port.shape)}, got {show_shape(array.shape)}."
        )
    return np.ascontiguousarray(array).reshape(array.shape)
