"""The vocabulary beside an exported decoder: tokenizer.json and what config.json says of its special
tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeinfer.errors import PromptError
from edgeinfer.inputs.text import open_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_BYTES = 64 << 20


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for 256 and up."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}


class TextVocabulary:
    """Token ids and text of a decoder in `folder`: what edgeinfer.engines.llama.LlamaModel is for a GGUF
    file.

    Raises InputError where tokenizer.json is missing or broken.
    """

    def __init__(
        self, model_path: Path, vocabulary_size: int | None, metadata: Mapping[str, str] | None = None
    ):
        self._folder = model_path.parent
        self._tokenizer = open_tokenizer(model_path)
        self._size = vocabulary_size
        self._config = {
            **_stated(metadata or {}),
            **self._json("config.json"),
            **self._json("generation_config.json"),
        }
        self._settings = self._json("tokenizer_config.json")
        described = self._json("tokenizer.json")
        self._byte_level = '"ByteLevel"' in json.dumps(
            [described.get("pre_tokenizer"), described.get("decoder")]
        )
        self._added = {
            entry["id"]: (entry["content"], bool(entry.get("special")))
            for entry in described.get("added_tokens") or ()
        }

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        try:
            if path.stat().st_size > _MOST_BYTES:
                return {}
            values = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def train_context(self) -> int:
        """Tokens of context that the model was trained with; 0 where nothing says it."""
        found = self._config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else 0

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own Jinja template, or None."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text("utf-8", "replace")
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    @property
    def bos_text(self) -> str:
        return self._special("bos_token")

    @property
    def eos_text(self) -> str:
        return self._special("eos_token")

    def _special(self, name: str) -> str:
        found = self._settings.get(name)
        return found.get("content", "") if isinstance(found, dict) else found or ""

    @cached_property
    def _ends(self) -> frozenset[int]:
        found = self._config.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        by_text = self._tokenizer.token_to_id(self.eos_text) if self.eos_text else None
        return frozenset(token for token in (*ids, by_text) if isinstance(token, int))

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation."""
        return token in self._ends

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; see LlamaModel.tokenize. Raises PromptError for ids that the model does not
        have."""
        self._tokenizer.encode_special_tokens = not parse_special
        try:
            tokens = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        except Exception as error:  # the package raises plain Exception
            raise PromptError(f"The tokenizer refused the text: {error}") from error
        if self._size is not None and tokens and max(tokens) >= self._size:
            raise PromptError(
                f"The tokenizer gave token {max(tokens)}, but the model has {self._size}. tokenizer.json is "
                "of another "
                "model."
            )
        return tokens

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, perhaps part of a character; b"" for control tokens."""
        if token in self._added:
            content, special = self._added[token]
            return b"" if special else content.encode("utf-8")
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_ALPHABET[char] for char in piece if char in _ALPHABET)
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode("utf-8")

    def close(self) -> None:
        """Nothing is open."""


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What an exported model says of itself, under config.json's names."""
    found: dict[str, Any] = {}
    for key, name in (("context_length", "max_position_embeddings"), ("eos_token_id", "eos_token_id")):
        try:
            found[name] = json.loads(metadata[f"edgeinfer.{key}"])
        except (KeyError, ValueError):
            continue
    return found


_ALPHABET = _byte_alphabet()
