"""From what the user gives (`NAME=FILE`, `NAME=NUMBER`, `FILE`, `-`) to an array for each input of a
model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms.form import Form, PictureInput
from edgeinfer.inputs.arrays import read_npy, read_npz, read_number
from edgeinfer.inputs.files import kind_of, open_input
from edgeinfer.inputs.sound import read_wav
from edgeinfer.inputs.text import bytes_input, is_text_model, open_tokenizer, text_feeds
from edgeinfer.onnx.ports import Port
from edgeinfer.streams.state import find_state, zero_state


@dataclass(frozen=True)
class InputOptions:
    """`resize`, `normalize`: see edgeinfer.inputs.images.with_options; `text`: for a model with a
    tokenizer."""

    resize: str | None = None
    normalize: str | None = None
    text: str | None = None


@dataclass
class Fed:
    """Arrays by input; the picture that was given, and where it lies in its input; what was assumed, for
    people."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    picture: Any = None
    placement: Any = None
    notes: list[str] = field(default_factory=list)


def gather_feeds(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    given: Sequence[str],
    form: Form | None,
    model_path: Path,
    options: InputOptions = InputOptions(),
    open_file: Callable[[str], BinaryIO] = open_input,
) -> Fed:
    """An array for each input. Inputs that are left out get the form's value, or zeros where they are state.
    `open_file`: opens what is named; see edgeinfer.inputs.files.

    Raises InputError for files that cannot be used and for inputs that are missing or unknown.
    """
    gatherer = _Gatherer(inputs, outputs, form, model_path, options, open_file)
    if given.count("-") + sum(item.endswith("=-") for item in given) > 1:
        raise InputError("Two inputs are to come from standard input. Only one can.")
    for item in given:
        gatherer.take(item)
    if options.text is not None:
        gatherer.take_text(options.text.encode(), "The text")
    return gatherer.finish()


class _Gatherer:
    def __init__(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        form: Form | None,
        model_path: Path,
        options: InputOptions,
        open_file: Callable[[str], BinaryIO],
    ):
        self._open = open_file
        self._ports = {port.name: port for port in inputs}
        self._form = form
        self._model_path = model_path
        self._options = options
        self._values: Mapping[str, float] = form.values if form else {}
        self._state = find_state(inputs, outputs, form.state if form else {})
        self._fed = Fed()

    def take(self, item: str) -> None:
        name, equals, value = item.partition("=")
        if equals and name in self._ports:
            self._set(name, self._value(self._ports[name], value))
        elif equals and not Path(item).exists():
            raise InputError(
                f"The model has no input {name!r}. Its inputs are {self._describe(self._ports)}."
            )
        else:
            self._take_unnamed(item)

    def _take_unnamed(self, item: str) -> None:
        with self._open(item) as file:
            kind = kind_of(file)
            if kind == "npz":
                self._take_npz(read_npz(file, item))
                return
            if kind == "bytes" and is_text_model(list(self._ports.values())):
                self.take_text(file.read(), item)
                return
            open_ports = self._open_ports()
            if len(open_ports) != 1:
                raise InputError(
                    f"Which input is {item} for? Say --input NAME={item}. The inputs are "
                    f"{self._describe(self._ports)}."
                )
            self._set(open_ports[0], self._read(self._ports[open_ports[0]], file, kind, item))

    def _take_npz(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Arrays by their names; the only one needs none where one input is left."""
        left = self._open_ports()
        if len(arrays) == 1 and len(left) == 1 and not set(arrays) & set(self._ports):
            arrays = {left[0]: next(iter(arrays.values()))}
        for name, array in arrays.items():
            self._set(name, array)

    def _open_ports(self) -> list[str]:
        """Inputs that need a value and have none yet."""
        return [name for name in self._ports if name not in self._optional and name not in self._fed.arrays]

    @property
    def _optional(self) -> set[str]:
        return {*self._values, *self._state}

    def _value(self, port: Port, text: str) -> np.ndarray:
        number = read_number(text, port)
        if number is not None:
            return number
        with self._open(text) as file:
            return self._read(port, file, kind_of(file), text)

    def _read(self, port: Port, file: BinaryIO, kind: str, name: str) -> np.ndarray:
        as_bytes = _for_port(self._form.bytes, port) if self._form else None
        if as_bytes is not None:
            return bytes_input(file.read(), as_bytes, port)
        if kind == "npy":
            return read_npy(file, name)
        if kind == "npz":
            return self._one_of_npz(read_npz(file, name), port, name)
        if kind == "picture":
            return self._picture(port, file, name)
        if kind == "sound":
            return self._sound(port, file, name)
        return self._plain(port, file, name)

    def _one_of_npz(self, arrays: Mapping[str, np.ndarray], port: Port, name: str) -> np.ndarray:
        if port.name in arrays:
            return arrays[port.name]
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        raise InputError(f"{name} has no array {port.name!r}. It has {', '.join(arrays) or 'none'}.")

    def _picture(self, port: Port, file: BinaryIO, name: str) -> np.ndarray:
        from edgeinfer.inputs.images import (
            is_picture_port,
            normalization_of,
            read_picture,
            to_input,
            with_options,
        )

        if not is_picture_port(port):
            raise InputError(
                f"{name} is a picture, but input {port.name!r} is {port.describe()}, which takes none."
            )
        known = _for_port(self._form.pictures, port) if self._form else None
        form, size = with_options(known or PictureInput(), self._options.resize, self._options.normalize)
        if known is None and self._options.normalize is None and port.dtype.kind == "f":
            self._fed.notes.append(
                f"No form describes this model: {name} is {form.channels.upper()}, normalization "
                f"{normalization_of(form)}. --normalize, --resize and --form change that."
            )
        picture = read_picture(file, name)
        array, placement = to_input(picture, port, form, size)
        self._fed.picture, self._fed.placement = picture, placement
        return array

    def _sound(self, port: Port, file: BinaryIO, name: str) -> np.ndarray:
        if port.dtype.kind != "f" or len(port.shape) not in (1, 2, 3):
            raise InputError(
                f"{name} is a sound, but input {port.name!r} is {port.describe()}, which takes none."
            )
        if self._form and self._form.framing:
            raise InputError(
                f"{name} is a sound, which goes through this model in steps. Name its file as the only "
                "--input, or use "
                "edgeinfer stream."
            )
        samples, rate = read_wav(file, name)
        self._fed.notes.append(
            f"No form says what sound this model takes: {name} is given as it is, one channel of {rate:,} "
            "samples a second."
        )
        return samples.astype(port.dtype).reshape([1] * (len(port.shape) - 1) + [len(samples)])

    def _plain(self, port: Port, file: BinaryIO, name: str) -> np.ndarray:
        data = file.read()
        if port.type_name == "string":
            return np.full([1] * len(port.shape), data.decode("utf-8", "replace"), object)
        if port.dtype == np.uint8 and len(port.shape) in (1, 2):
            return np.frombuffer(data, np.uint8).reshape([1] * (len(port.shape) - 1) + [len(data)])
        if port.dtype.kind == "i" and is_text_model([port]):
            self.take_text(data, name)
            return self._fed.arrays[port.name]
        raise InputError(
            f"{name} is none of .npy, .npz, PNG, JPEG and WAV, and input {port.name!r} is {port.describe()}. "
            "Check the file."
        )

    def take_text(self, data: bytes, name: str) -> None:
        if not is_text_model(list(self._ports.values())):
            raise InputError(
                f"{name}: this model takes no text. Its inputs are {self._describe(self._ports)}."
            )
        tokenizer = open_tokenizer(self._model_path)
        for port, array in text_feeds(data, list(self._ports.values()), tokenizer, name).items():
            self._fed.arrays.setdefault(port, array)

    def _set(self, name: str, array: np.ndarray) -> None:
        if name not in self._ports:
            raise InputError(
                f"The model has no input {name!r}. Its inputs are {self._describe(self._ports)}."
            )
        self._fed.arrays[name] = array

    def finish(self) -> Fed:
        arrays = self._fed.arrays
        for name, value in self._values.items():
            if name in self._ports and name not in arrays:
                port = self._ports[name]
                arrays[name] = np.full([1] * len(port.shape), value, port.dtype)
        for name in self._state:
            if name not in arrays:
                arrays[name] = zero_state(self._ports[name])
        if missing := {name: port for name, port in self._ports.items() if name not in arrays}:
            raise InputError(
                f"No value is given for {self._describe(missing)}. Say --input NAME=FILE for each."
            )
        return self._fed

    def _describe(self, ports: Mapping[str, Port]) -> str:
        return ", ".join(f"{name} ({port.describe()})" for name, port in ports.items()) or "none"


def _for_port(known: Mapping[str, Any], port: Port) -> Any:
    return known.get(port.name) or known.get("*")
