"""Text and bytes: token ids through the tokenizer beside a model, or the bytes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms.form import BytesInput
from edgeinfer.onnx.ports import Port

_IDS = ("input_ids", "tokens", "token_ids", "ids")


def bytes_input(data: bytes, form: BytesInput, port: Port) -> np.ndarray:
    """[1, first + last] numbers; see BytesInput."""
    first = data[: form.block].lstrip()[: form.first]
    last = data[-form.block :].rstrip()[-form.last :] if form.last else b""
    values = np.full(form.first + form.last, form.padding, port.dtype)
    values[: len(first)] = np.frombuffer(first, np.uint8)
    values[len(values) - len(last) :] = np.frombuffer(last, np.uint8)
    return values[None]


def is_text_model(ports: Sequence[Port]) -> bool:
    return any(port.name in _IDS and port.dtype.kind == "i" for port in ports)


def open_tokenizer(model_path: Path) -> Any:
    """The tokenizer.json beside the model. Raises InputError where it, or the package that reads it, is
    missing."""
    path = model_path.parent / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"A text needs a tokenizer: expected {path}. Put it there, or give token ids as .npy."
        )
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise InputError('Text needs the package tokenizers: pip install "edgeinfer[inputs]".') from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{path} is not a tokenizer that can be used: {error}.") from error


def text_feeds(data: bytes, ports: Sequence[Port], tokenizer: Any, name: str) -> dict[str, np.ndarray]:
    """The inputs of a text model, [1, tokens] each: ids, attention mask, token types and positions, where it
    has them."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}).") from None
    encoding = tokenizer.encode(text)
    if not encoding.ids:
        raise InputError(f"{name} has no tokens. Give the model some text.")
    known = {
        **dict.fromkeys(_IDS, encoding.ids),
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
        "position_ids": list(range(len(encoding.ids))),
    }
    return {port.name: np.array([known[port.name]], port.dtype) for port in ports if port.name in known}
