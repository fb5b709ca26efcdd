"""The files of a checkpoint folder that say how text becomes tokens, read with bounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ExportError

MAX_FILE_BYTES = 256 << 20  # gemma 3's tokenizer.json has 33 MB
MAX_TOKENS = 1 << 20  # edgeinfer's own reader of GGUF allows no more; the largest real ones have 262,208
AGAIN = "The file is damaged: get it again."


@dataclass(frozen=True)
class TokenizerFiles:
    """What the folder holds; an absent file is None or empty."""

    folder: Path
    tokenizer: dict[str, Any] | None  # tokenizer.json
    settings: dict[str, Any]  # tokenizer_config.json
    special_map: dict[str, Any]  # special_tokens_map.json
    added: dict[str, Any]  # added_tokens.json: text -> id
    generation: dict[str, Any]  # generation_config.json

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).is_file()


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Raises ExportError for a file that is not JSON, too large, or no JSON object."""
    if not folder.is_dir():
        raise ExportError(
            f"{folder}: expected a checkpoint folder with the tokenizer's files; there is no such folder."
        )
    return TokenizerFiles(
        folder=folder,
        tokenizer=read_object(folder / "tokenizer.json"),
        settings=read_object(folder / "tokenizer_config.json") or {},
        special_map=read_object(folder / "special_tokens_map.json") or {},
        added=read_object(folder / "added_tokens.json") or {},
        generation=read_object(folder / "generation_config.json") or {},
    )


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: is not JSON ({error}). {AGAIN}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(value).__name__}. {AGAIN}")
    return value


def read_text(path: Path) -> str:
    """A text file in UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start:,}). {AGAIN}"
        ) from None


def read_bytes(path: Path) -> bytes:
    """A whole file of at most MAX_FILE_BYTES."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise ExportError(f"{path}: has more than {MAX_FILE_BYTES:,} bytes, which no tokenizer's file needs.")
    return data


def is_utf8(text: str) -> bool:
    """JSON can hold lone surrogates, which are no text and cannot be written."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_id(value: Any) -> bool:
    """Whether a JSON value can be the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS
