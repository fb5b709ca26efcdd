"""Reading forms from their files, and finding the one of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgeinfer.errors import InputError
from edgeinfer.forms.form import (
    BoxesResult,
    BytesInput,
    ClassesResult,
    Form,
    Framing,
    GateRule,
    PictureInput,
    RegionsResult,
)
from edgeinfer.onnx.ports import Port

FOLDER = Path(__file__).parent
Part = TypeVar("Part")

_ONE = {
    "framing": Framing,
    "gate": GateRule,
    "classes": ClassesResult,
    "boxes": BoxesResult,
    "regions": RegionsResult,
}
_BY_INPUT = {"pictures": PictureInput, "bytes": BytesInput}


def form_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_form(name: str) -> Form:
    """The form `name`, or that of a JSON file of the user's own. Raises InputError."""
    path = FOLDER / f"{name}.json" if name in form_names() else Path(name)
    if not path.is_file():
        raise InputError(
            f"There is no form {name!r}. Known forms: {', '.join(form_names())}. A path to a JSON file "
            "works too."
        )
    return _read(path)


@cache
def _all_forms() -> tuple[Form, ...]:
    return tuple(read_form(name) for name in form_names())


def find_form(inputs: Sequence[Port], outputs: Sequence[Port]) -> Form | None:
    """The form whose inputs and outputs are those of a model; the one that says most where several fit."""
    found = [form for form in _all_forms() if matches(form, inputs, outputs)]
    return max(found, key=_exactness, default=None)


def _exactness(form: Form) -> int:
    shapes = [shape for ports in form.match.values() for _, shape in ports.values()]
    return sum(isinstance(size, int) for shape in shapes for size in shape)


def matches(form: Form, inputs: Sequence[Port], outputs: Sequence[Port]) -> bool:
    """Whether these are the form's inputs and outputs. A size is a number, null (any), or a letter: the same
    one everywhere. The name "*" stands for any name, where there is one input or output."""
    letters: dict[str, int] = {}
    return _match(form.match.get("inputs", {}), inputs, letters) and _match(
        form.match.get("outputs", {}), outputs, letters
    )


def _match(wanted: Mapping[str, Any], ports: Sequence[Port], letters: dict[str, int]) -> bool:
    if len(wanted) != len(ports):
        return False
    by_name = {port.name: port for port in ports}
    if set(wanted) == {"*"}:
        by_name = {"*": ports[0]}
    return all(name in by_name and _fits(by_name[name], *known, letters) for name, known in wanted.items())


def _fits(port: Port, kind: str, shape: Sequence[int | str | None], letters: dict[str, int]) -> bool:
    if port.type_name != kind or len(port.shape) != len(shape):
        return False
    for known, size in zip(shape, port.shape):
        if isinstance(known, str) and isinstance(size, int):
            known = letters.setdefault(known, size)
        if isinstance(known, int) and known != size:
            return False
    return True


def _read(path: Path) -> Form:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The form {path} cannot be read as JSON: {error}.") from error
    try:
        return _make_form(values, path)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"The form {path} is not right: {error}.") from error


def _make_form(values: Mapping[str, Any], path: Path) -> Form:
    values = dict(values)
    values.setdefault("name", path.stem)
    for key, part in _ONE.items():
        if key in values:
            values[key] = _build(part, values[key], key)
    for key, part in _BY_INPUT.items():
        values[key] = {
            name: _build(part, found, f"{key}.{name}") for name, found in values.get(key, {}).items()
        }
    values["match"] = {
        side: {name: (kind, tuple(shape)) for name, (kind, shape) in ports.items()}
        for side, ports in values.get("match", {}).items()
    }
    return _build(Form, values, "the form")


def _build(part: type[Part], values: Mapping[str, Any], where: str) -> Part:
    """A dataclass from JSON: unknown keys are refused, lists become tuples."""
    known = {field.name: field for field in fields(part)}
    if unknown := set(values) - set(known):
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}; known are {sorted(known)}")
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            raise ValueError(f"{where} lacks {name!r}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return part(**plain)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
