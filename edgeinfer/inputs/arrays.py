"""Arrays from .npy and .npz files, and numbers from the command line."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.onnx.ports import Port

_BROKEN = (ValueError, OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile)


def read_npy(file: BinaryIO, name: str) -> np.ndarray:
    """The array of a .npy file. Pickled objects are refused: reading them would run code. Raises
    InputError."""
    try:
        return _native(np.lib.format.read_array(file, allow_pickle=False))
    except MemoryError:
        raise InputError(f"{name}: the array is larger than memory.") from None
    except _BROKEN as error:
        raise InputError(f"{name} is not a .npy file that can be used: {_reason(error)}.") from error


def read_npz(file: BinaryIO, name: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by their names. Raises InputError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: _native(arrays[key]) for key in arrays.files}
    except MemoryError:
        raise InputError(f"{name}: its arrays are larger than memory.") from None
    except (*_BROKEN, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{name} is not a .npz file that can be used: {_reason(error)}.") from error


def _native(array: np.ndarray) -> np.ndarray:
    """In this machine's order of bytes: numpy's types say it, a model's do not."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _reason(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    if "allow_pickle" in text:
        return "it holds pickled Python objects, which are never loaded; save plain arrays"
    return text or type(error).__name__


def read_number(text: str, port: Port) -> np.ndarray | None:
    """The number `text` in the input's type and number of dimensions; None where `text` is no number."""
    if text.lower() in ("true", "false"):
        number: float | int = text.lower() == "true"
    else:
        try:
            number = int(text)
        except ValueError:
            try:
                number = float(text)
            except ValueError:
                return None
    if any(isinstance(size, int) and size != 1 for size in port.shape):
        raise InputError(
            f"Input {port.name!r} is {port.describe()}: the one number {text} is not enough. Give a file."
        )
    if port.dtype.kind in "iu":
        limits = np.iinfo(port.dtype)
        if number != int(number) or not limits.min <= number <= limits.max:
            raise InputError(f"Input {port.name!r} is {port.type_name}, which cannot hold {text}.")
    elif port.dtype.kind not in "fb":
        raise InputError(f"Input {port.name!r} is {port.type_name}, not a number. Give a file.")
    return np.full([1] * len(port.shape), number, port.dtype)
