"""Outputs as files: .npz with one array an output, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One array an output, by its name. Text becomes fixed-width text: nothing is pickled."""
    plain = {name: array.astype(str) if array.dtype == object else array for name, array in arrays.items()}
    with path.open("wb") as file:
        np.savez(file, **_without_clashes(plain))


def _without_clashes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """np.savez has parameters of its own; an output of such a name gets an underscore."""
    return {f"{name}_" if name in ("file", "allow_pickle") else name: array for name, array in arrays.items()}


def json_array(array: np.ndarray) -> dict[str, Any]:
    """Type, shape and values; JSON has neither NaN nor infinity, so they become strings."""
    kind = "string" if array.dtype == object else str(array.dtype)
    return {"type": kind, "shape": list(array.shape), "values": plain(array.tolist())}


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value


def to_json(value: Any) -> str:
    return json.dumps(plain(value), allow_nan=False)


def summary(name: str, array: np.ndarray) -> str:
    """One line for people: type, shape, range and the first values."""
    shape = " x ".join(map(str, array.shape)) or "one value"
    line = f"{name}: {'text' if array.dtype == object else array.dtype} {shape}"
    if array.size == 0:
        return f"{line}, empty"
    first = array.ravel()[:5].tolist()
    shown = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in first)
    more = ", ..." if array.size > 5 else ""
    if array.dtype.kind in "fiu" and array.size > 5:
        line += f", {array.min():.4g} to {array.max():.4g}, mean {array.mean(dtype=np.float64):.4g}"
    return f"{line}: {shown}{more}"
