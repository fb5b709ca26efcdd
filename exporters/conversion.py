"""Elements from one float type to another, in memory that the caller gives: no copies of a whole tensor."""

from __future__ import annotations

import numpy as np

from edgeinfer.errors import ExportError

#: Type -> how numpy holds it; bfloat16, which numpy does not know, as the upper half of a float32.
STORAGE: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_BLOCK = 1 << 16  # elements at once: the temporaries stay in the processor's cache


class OutOfRange(ExportError):
    """A number is too large for float16."""


def convert(
    source: np.ndarray, source_type: str, target: np.ndarray, target_type: str, add: float = 0.0
) -> None:
    """Fill `target` with `source` (both flat, as STORAGE holds their types), each element plus `add`.

    Rounds to nearest, ties to even. Raises OutOfRange where a finite number would become infinite in F16.
    """
    if source_type == target_type and not add:
        target[:] = source
        return
    for start in range(0, source.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        numbers = to_float32(source[block], source_type)
        if add:
            numbers = numbers + np.float32(add)
        _from_float32(numbers, target[block], target_type)


def to_float32(source: np.ndarray, source_type: str) -> np.ndarray:
    """`source` as float32: itself where it is that already."""
    if source_type == "BF16":
        return (source.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return source.astype(np.float32, copy=False)


def _from_float32(numbers: np.ndarray, target: np.ndarray, target_type: str) -> None:
    if target_type == "BF16":
        target[:] = _upper_half(numbers)
        return
    try:
        with np.errstate(over="raise"):
            target[:] = numbers
    except FloatingPointError:
        largest = float(np.abs(numbers[np.isfinite(numbers)]).max())
        raise OutOfRange(f"holds {largest:g}, F16 at most 65504") from None


def _upper_half(numbers: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 numbers. A NaN stays one: rounding its bits could make it infinite."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    nan = np.isnan(numbers)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded


def interleave_halves(source: np.ndarray, target: np.ndarray, head_rows: int, columns: int) -> None:
    """Rows of whole heads: row i of a head's first half goes to 2i, of its second half to 2i + 1.

    transformers rotates element i with element i + half, llama.cpp (for llama) neighbours.
    """
    halves = source.reshape(-1, 2, head_rows // 2, columns)
    target.reshape(-1, head_rows // 2, 2, columns)[:] = halves.swapaxes(1, 2)
