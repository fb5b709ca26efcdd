"""The tokens of a vocabulary by id: base tokens, added ones, unused ones where the model has more rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.added_tokens import AddedToken
from edgeinfer.exporters.tokenizer_files import MAX_TOKENS, is_id, is_utf8

MAX_CHARACTERS = 1024  # of a token; the longest real ones have 128 or 256
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"


@dataclass
class TokenTable:
    """How llama.cpp is told to split text. `scores` for its "llama" tokenizer, `merges` for its "gpt2" one.

    `composes`: text is put into NFC first. `special`: ids of bos, eos, unk and pad where the tokenizer's own
    file gives them. `warnings`: where ids may differ from the original's.
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    composes: bool = False
    special: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def append(self, text: str, kind: int, score: float = 0.0) -> None:
        self.texts.append(text)
        self.types.append(kind)
        if self.scores is not None:
            self.scores.append(score)

    def ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}

    def add(self, where: str, added: list[AddedToken]) -> None:
        """Put added tokens in: over the base token of the same id and text, or behind the base tokens.

        Raises ExportError: two texts for an id, two ids for a text, or ids with a gap before them
        (transformers would then number them differently than the file says).
        """
        ids = self.ids()
        for token in sorted(added, key=lambda token: token.id):
            known = ids.get(token.text)
            if known is not None and known != token.id:
                raise ExportError(
                    f"{where}: {token.text!r} has the ids {known} and {token.id}. Expected one id a token."
                )
            if token.id > len(self.texts):
                raise ExportError(
                    f"{where}: the added token {token.text!r} has the id {token.id}, but the tokens before "
                    f"it end at {len(self.texts) - 1}. Ids must not have gaps: a file with the tokens "
                    "between is missing."
                )
            if token.id < len(self.texts) and known is None:
                self._replace(where, token, ids)
            elif token.id == len(self.texts):
                self.append(token.text, NORMAL)
            if self.types[token.id] != UNKNOWN:
                self.types[token.id] = CONTROL if token.special else USER_DEFINED
            ids[token.text] = token.id

    def _replace(self, where: str, token: AddedToken, ids: Mapping[str, int]) -> None:
        """SentencePiece models keep places free, named <unusedN> or so, which a tokenizer may name anew."""
        if self.types[token.id] not in (CONTROL, USER_DEFINED, UNUSED):
            raise ExportError(
                f"{where}: id {token.id} is {self.texts[token.id]!r} and also the added token "
                f"{token.text!r}. Expected one text an id: the files do not belong together."
            )
        self.texts[token.id] = token.text

    def set_special(self, texts: set[str]) -> None:
        """Ordinary tokens that are called special by name are so, as for transformers."""
        for token, text in enumerate(self.texts):
            if text in texts and self.types[token] == NORMAL:
                self.types[token] = CONTROL

    def fit(self, size: int | None, needed: set[str], where: str) -> None:
        """Cut or fill the table so that it has as many tokens as the model has rows; `size` None: as it is.

        Raises ExportError where ordinary or `needed` tokens would have no row. Other added tokens behind the
        last row are dropped with a warning: a tokenizer may serve other models too (gemma 3 1B has no row for
        images).
        """
        size = len(self.texts) if size is None else size
        beyond = [
            token for token in range(size, len(self.texts)) if self.types[token] in (CONTROL, USER_DEFINED)
        ]
        if len(self.texts) > size + len(beyond) or needed.intersection(self.texts[size:]):
            raise ExportError(
                f"{where}: the tokenizer has {len(self.texts):,} tokens, but config.json says vocab_size "
                f"{size:,}. The tokenizer belongs to another model, or config.json is wrong."
            )
        if beyond:
            names = ", ".join(repr(self.texts[token]) for token in beyond[:3])
            self.warnings.append(
                f"{len(beyond)} added token(s) are left out, because the model has no rows for them: {names}"
            )
            del self.texts[size:], self.types[size:]
            if self.scores is not None:
                del self.scores[size:]
        self._fill(size)

    def _fill(self, size: int) -> None:
        taken = set(self.texts)
        for token in range(len(self.texts), size):
            text = f"[PAD{token}]"
            while text in taken:
                text = f"[{text}]"
            self.append(text, UNUSED)

    def check(self, where: str) -> None:
        """What would make llama.cpp abort or read other texts. Raises ExportError."""
        seen: dict[str, int] = {}
        for token, text in enumerate(self.texts):
            if not text:
                raise ExportError(f"{where}: token {token} is an empty text. Every token needs a text.")
            if "\0" in text:
                raise ExportError(
                    f"{where}: token {token}, {text[:40]!r}, holds a zero byte, which GGUF readers cut at."
                )
            if not is_utf8(text):
                raise ExportError(
                    f"{where}: token {token}, {text[:40]!r}, is not valid Unicode (a lone surrogate)."
                )
            if text in seen:
                raise ExportError(
                    f"{where}: tokens {seen[text]} and {token} are both {text[:40]!r}. Expected one id a "
                    "text."
                )
            seen[text] = token


def table_size(config: Mapping[str, Any], where: str) -> int | None:
    """The rows of the model's embedding by config.json (its text_config for models that also see)."""
    size = config.get("vocab_size")
    nested = config.get("text_config")
    if size is None and isinstance(nested, dict):
        size = nested.get("vocab_size")
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MAX_TOKENS:
        raise ExportError(
            f"{where}: vocab_size is {str(size)[:40]}, expected a count from 1 to {MAX_TOKENS:,}."
        )
    return size


def base_tokens(where: str, vocabulary: Any) -> list[str]:
    """Texts by id from a JSON object text -> id whose ids are 0, 1, 2, ... in any order; else ExportError."""
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ExportError(f"{where}: expected the vocabulary as a JSON object of text -> id.")
    if len(vocabulary) > MAX_TOKENS:
        raise ExportError(f"{where}: has {len(vocabulary):,} tokens, at most {MAX_TOKENS:,} are allowed.")
    texts: dict[int, str] = {}
    for text, token in vocabulary.items():
        if not is_id(token):
            raise ExportError(
                f"{where}: the id of {text[:40]!r} is {str(token)[:40]}, expected a whole number."
            )
        if len(text) > MAX_CHARACTERS or not is_utf8(text):
            raise ExportError(
                f"{where}: token {token}, {text[:40]!r}, is not Unicode text of at most {MAX_CHARACTERS:,} "
                "characters."
            )
        if token in texts:
            raise ExportError(f"{where}: id {token} is both {texts[token][:40]!r} and {text[:40]!r}.")
        texts[token] = text
    missing = next((token for token in range(len(texts)) if token not in texts), None)
    if missing is not None:
        raise ExportError(
            f"{where}: no token has the id {missing}, though ids go up to {max(texts):,}. Ids must not have "
            "gaps."
        )
    return [texts[token] for token in range(len(texts))]
