"""Measurements of this machine that are kept between runs, in one small JSON file of the user's cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


def cache_folder() -> Path:
    """Where edgeinfer keeps what it can make again: $XDG_CACHE_HOME/edgeinfer or ~/.cache/edgeinfer."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgeinfer"


def remembered(key: str, measure: Callable[[], Value], again: bool = False, kind: type = object) -> Value:
    """The value (JSON) kept under `key`; measured and kept where there is none of this `kind`, or `again`.

    A cache that cannot be read or written costs time, nothing else.
    """
    try:
        path = cache_folder() / "measured.json"
    except RuntimeError:  # a user without a home folder, as containers have
        return measure()
    values = _read(path)
    if key in values and isinstance(values[key], kind) and not again:
        return values[key]
    value = measure()
    _write(path, {**_read(path), key: value})
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            beside = file.name
            json.dump(values, file, indent=1, sort_keys=True)
        os.replace(beside, path)
    except OSError:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
