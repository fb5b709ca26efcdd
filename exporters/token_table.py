"""The tokens of a vocabulary by id: base tokens, added tokens, and unused ones where the model has more rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.tokenizer_files import TokenizerFiles

MAX_TOKENS = 1 << 20  # edgeinfer's own reader of GGUF allows no more; the largest real ones have 262,208
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"
_ADDED_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before anything else is done with it."""

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass
class TokenTable:
    """How llama.cpp is told to split text. `scores` for its "llama" tokenizer, `merges` for its "gpt2" one.

    `special`: ids of bos, eos, unk and pad where the tokenizer's own file gives them. `warnings`: where ids may differ
    from the original's.
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}

    def add(self, where: str, added: list[AddedToken]) -> None:
        """Put added tokens in: over the base token of the same id and text, or behind the base tokens.

        Raises ExportError: two texts for an id, two ids for a text, or ids with a gap before them (transformers would
        then number them differently than the file says).
        """
        ids = self.ids()
        for token in sorted(added, key=lambda token: token.id):
            known = ids.get(token.text)
            if known is not None and known != token.id:
                raise ExportError(f"{where}: {token.text!r} has the ids {known} and {token.id}. Expected one id a token.")
            if token.id > len(self.texts):
                raise ExportError(
                    f"{where}: the added token {token.text!r} has the id {token.id}, but the tokens before it end at "
                    f"{len(self.texts) - 1}. Ids must not have gaps: a file with the tokens between is missing."
                )
            if token.id < len(self.texts) and known is None:
                self._replace(where, token, ids)
            elif token.id == len(self.texts):
                self._append(token)
            self.types[token.id] = CONTROL if token.special else USER_DEFINED
            ids[token.text] = token.id

    def _append(self, token: AddedToken) -> None:
        self.texts.append(token.text)
        self.types.append(NORMAL)
        if self.scores is not None:
            self.scores.append(0.0)

    def _replace(self, where: str, token: AddedToken, ids: Mapping[str, int]) -> None:
        """SentencePiece models keep places free, named <unusedN> or so, which a tokenizer may name anew."""
        if self.types[token.id] not in (CONTROL, USER_DEFINED, UNUSED):
            raise ExportError(
                f"{where}: id {token.id} is {self.texts[token.id]!r} and also the added token {token.text!r}. "
                "Expected one text an id: the files do not belong together."
            )
        self.texts[token.id] = token.text

    def fit(self, size: int | None, where: str) -> None:
        """Cut or fill the table so that it has as many tokens as the model has rows; `size` None: as it is.

        Raises ExportError where tokens would have no row. Added tokens behind the last row are dropped with a warning:
        a tokenizer may serve larger models of its family too (gemma 3 1B has no row for its image token).
        """
        size = len(self.texts) if size is None else size
        beyond = [token for token in range(size, len(self.texts)) if self.types[token] in (CONTROL, USER_DEFINED)]
        if len(self.texts) > size + len(beyond):
            raise ExportError(
                f"{where}: the tokenizer has {len(self.texts):,} tokens, but config.json says vocab_size {size:,}. "
                "The tokenizer belongs to another model, or config.json is wrong."
            )
        if beyond:
            names = ", ".join(repr(self.texts[token]) for token in beyond[:3])
            self.warnings.append(
                f"{len(beyond)} added token(s) are left out, because the model has no rows for them: {names}."
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
            self.texts.append(text)
            self.types.append(UNUSED)
            if self.scores is not None:
                self.scores.append(0.0)

    def check(self, where: str) -> None:
        """What would make llama.cpp abort or read other texts. Raises ExportError."""
        seen: dict[str, int] = {}
        for token, text in enumerate(self.texts):
            if not text:
                raise ExportError(f"{where}: token {token} is an empty text. Every token needs a text.")
            if "\0" in text:
                raise ExportError(f"{where}: token {token}, {text[:40]!r}, holds a zero byte, which GGUF readers cut at.")
            if not _is_utf8(text):
                raise ExportError(f"{where}: token {token}, {text[:40]!r}, is not valid Unicode (a lone surrogate).")
            if text in seen:
                raise ExportError(f"{where}: tokens {seen[text]} and {token} are both {text[:40]!r}. Expected one id a text.")
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
        raise ExportError(f"{where}: vocab_size is {str(size)[:40]}, expected a count from 1 to {MAX_TOKENS:,}.")
    return size


def base_tokens(where: str, vocabulary: Any) -> list[str]:
    """Texts by id from a JSON object text -> id whose ids are 0, 1, 2, ... in any order; else ExportError.

    Ids that are absent may belong to added tokens, so gaps are filled with "" and looked at by `fill_gaps`.
    """
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ExportError(f"{where}: expected the vocabulary as a JSON object of text -> id.")
    if len(vocabulary) > MAX_TOKENS:
        raise ExportError(f"{where}: has {len(vocabulary):,} tokens, at most {MAX_TOKENS:,} are allowed.")
    texts: dict[int, str] = {}
    for text, token in vocabulary.items():
        if not _is_id(token):
            raise ExportError(f"{where}: the id of {text[:40]!r} is {str(token)[:40]}, expected a whole number.")
        if token in texts:
            raise ExportError(f"{where}: id {token} is both {texts[token][:40]!r} and {text[:40]!r}.")
        texts[token] = text
    missing = next((token for token in range(len(texts)) if token not in texts), None)
    if missing is not None:
        raise ExportError(
            f"{where}: no token has the id {missing}, though ids go up to {max(texts):,}. Ids must not have gaps."
        )
    return [texts[token] for token in range(len(texts))]


def read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """From tokenizer.json, else tokenizer_config.json (added_tokens_decoder), and added_tokens.json for the rest."""
    found: dict[str, AddedToken] = {}
    if files.tokenizer is not None:
        where = f"{files.path('tokenizer.json')}: added_tokens"
        entries = files.tokenizer.get("added_tokens") or []
        _keep(found, where, [(entry.get("id"), entry) for entry in _objects(where, entries)])
    where = f"{files.path('tokenizer_config.json')}: added_tokens_decoder"
    decoder = files.settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ExportError(f"{where}: expected a JSON object of id -> token.")
    _keep(found, where, [(_number(token), entry) for token, entry in zip(decoder, _objects(where, decoder.values()))])
    where = str(files.path("added_tokens.json"))
    _keep(found, where, [(token, {"content": text}) for text, token in files.added.items()])
    return list(found.values())


def _keep(found: dict[str, AddedToken], where: str, entries: list[tuple[Any, dict[str, Any]]]) -> None:
    """The first file that names a token says what it is; a later one must give it the same id."""
    for token, entry in entries:
        text = entry.get("content")
        if not isinstance(text, str) or not _is_id(token):
            raise ExportError(f"{where}: expected an id and a content, found {str(entry)[:80]} for id {str(token)[:20]}.")
        if text in found:
            if found[text].id != token:
                raise ExportError(f"{where}: {text[:40]!r} has the id {token}, elsewhere {found[text].id}.")
            continue
        flags = {name: entry.get(name) is True for name in _ADDED_FLAGS}
        found[text] = AddedToken(token, text, **flags)


def _objects(where: str, entries: Any) -> list[dict[str, Any]]:
    entries = list(entries) if not isinstance(entries, (str, dict)) else [entries]
    for entry in entries:
        if not isinstance(entry, dict):
            raise ExportError(f"{where}: expected JSON objects, found {str(entry)[:80]}.")
    return entries


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
