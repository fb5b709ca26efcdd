"""Names of classes: from the user's file, the model's metadata, a file beside the model, or edgeinfer's
own."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeinfer.errors import InputError
from edgeinfer.forms.reading import FOLDER

_BESIDE = ("labels.txt", "labels.json", "classes.txt", "id2label.json")
_IN_METADATA = ("names", "labels", "classes", "id2label")
_MAX_BYTES = 16 << 20

Labels = Sequence[str]


def find_labels(
    path: str | None,
    model_path: Path,
    metadata: Mapping[str, str],
    own: str | None = None,
    key: str | None = None,
) -> Labels | None:
    """The labels; None: there are none. `path` is the user's; `own` and `key` are what the model's form
    names.

    Raises InputError for a file that cannot be read.
    """
    if path is not None:
        return read_labels(Path(path), None)
    for name in _IN_METADATA:
        listed = "\n" in metadata.get(name, "") or metadata.get(name, "").lstrip()[:1] in ("{", "[")
        if listed and (labels := _parse(metadata[name], None)):
            return labels
    beside = [model_path.parent / name for name in ((own,) if own else ()) + _BESIDE]
    found = next((file for file in beside if file.is_file()), None)
    if found is not None:
        return read_labels(found, key if found.name == own else None)
    labels = _from_config(model_path.parent / "config.json")
    if labels is None and own is not None and (FOLDER / own).is_file():
        return read_labels(FOLDER / own, key)
    return labels


def read_labels(path: Path, key: str | None = None) -> Labels:
    """A line a class, or JSON: a list, or an object of number: name, under `key` where there is one."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(
                f"The labels {path} have {path.stat().st_size:,} bytes: that is no list of names."
            )
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"There is no file of labels {path}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The labels {path} cannot be read: {error}.") from error
    labels = _parse(text, key)
    if not labels:
        raise InputError(
            f"{path} has no labels. Expected a line a class, or JSON: a list of names, or an object of "
            "numbers and names."
        )
    return labels


def _from_config(path: Path) -> Labels | None:
    """id2label of a checkpoint's config.json, where one lies beside the model."""
    try:
        if path.stat().st_size <= _MAX_BYTES:
            return _named(json.loads(path.read_text("utf-8")).get("id2label"))
    except (OSError, ValueError, AttributeError):
        pass
    return None


def _parse(text: str, key: str | None) -> Labels | None:
    if text.lstrip()[:1] not in ("{", "["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)  # how Ultralytics writes {0: 'person', ...}
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if key is not None and isinstance(value, dict):
        value = value.get(key)
    return _named(value)


def _named(value: object) -> Labels | None:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    if isinstance(value, dict) and value:
        try:
            numbered = {int(number): str(name) for number, name in value.items()}
        except (TypeError, ValueError):
            return None
        if min(numbered) < 0 or max(numbered) > 1_000_000:
            return None
        return [numbered.get(number, f"class {number}") for number in range(max(numbered) + 1)]
    return None


def label_of(labels: Labels | None, number: int) -> str:
    return labels[number] if labels is not None and number < len(labels) else f"class {number}"
