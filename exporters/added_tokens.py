"""Tokens that were added to a trained tokenizer: looked for in the text before anything else is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.tokenizer_files import TokenizerFiles, is_id

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """`special`: no part of ordinary text; the rest says how it is looked for."""

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """From tokenizer.json, else tokenizer_config.json (added_tokens_decoder), else added_tokens.json."""
    found: dict[str, AddedToken] = {}
    if files.tokenizer is not None:
        where = f"{files.path('tokenizer.json')}: added_tokens"
        entries = files.tokenizer.get("added_tokens") or []
        if not isinstance(entries, list):
            raise ExportError(f"{where}: expected a list, found {type(entries).__name__}.")
        _keep(found, where, [(entry.get("id"), entry) for entry in _objects(where, entries)])
    where = f"{files.path('tokenizer_config.json')}: added_tokens_decoder"
    decoder = files.settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ExportError(f"{where}: expected a JSON object of id -> token.")
    _keep(
        found,
        where,
        [(_number(token), entry) for token, entry in zip(decoder, _objects(where, decoder.values()))],
    )
    where = str(files.path("added_tokens.json"))
    _keep(found, where, [(token, {"content": text}) for text, token in files.added.items()])
    return list(found.values())


def _keep(found: dict[str, AddedToken], where: str, entries: list[tuple[Any, dict[str, Any]]]) -> None:
    """The first file that names a token says what it is; a later one must give it the same id."""
    for token, entry in entries:
        text = entry.get("content")
        if not isinstance(text, str) or not is_id(token):
            raise ExportError(
                f"{where}: expected an id and a content, found {str(entry)[:80]} for id {str(token)[:20]}."
            )
        if text in found:
            if found[text].id != token:
                raise ExportError(f"{where}: {text[:40]!r} has the id {token}, elsewhere {found[text].id}.")
            continue
        flags = {name: entry.get(name) is True for name in _FLAGS}
        found[text] = AddedToken(token, text, **flags)


def _objects(where: str, entries: Iterable[Any]) -> list[dict[str, Any]]:
    entries = list(entries)
    for entry in entries:
        if not isinstance(entry, dict):
            raise ExportError(f"{where}: expected JSON objects, found {str(entry)[:80]}.")
    return entries


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def named_special_tokens(files: TokenizerFiles) -> set[str]:
    """Texts that tokenizer_config.json or special_tokens_map.json calls special, with an id or without."""
    texts: set[str | None] = set()
    for source in (files.settings, files.special_map):
        texts |= {text_of(source.get(name)) for name in _NAMED}
        for name in _LISTED:
            listed = source.get(name)
            texts |= {text_of(entry) for entry in listed} if isinstance(listed, list) else set()
    return {text for text in texts if text}


def text_of(entry: Any) -> str | None:
    """A token as text, or as an object with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None
