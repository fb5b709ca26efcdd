"""Which tokens begin and end text, as GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeinfer.exporters.token_table import CONTROL, USER_DEFINED, TokenTable
from edgeinfer.exporters.tokenizer_files import TokenizerFiles

_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
#: What ends a turn, by text, the most telling first.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<EOT>", "[EOT]")
_END_OF_MESSAGE = "<|eom_id|>"
#: llama.cpp stops at these whatever the metadata says (llama_vocab::impl::load).
_ALWAYS_ENDS = {*_END_OF_TURN, _END_OF_MESSAGE, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"}


def special_token_metadata(files: TokenizerFiles, config: Mapping[str, Any], table: TokenTable) -> dict[str, Any]:
    """Ids of begin, end, unknown and padding, of what ends a turn or message, and whether begin and end are added."""
    ids = table.ids()
    metadata: dict[str, Any] = {}
    for kind, key in _KEYS.items():
        token = _token(kind, files, config, ids, table)
        if token is not None:
            metadata[f"tokenizer.ggml.{key}"] = token
    metadata |= _ends(files, config, table, ids, metadata.get("tokenizer.ggml.eos_token_id"))
    metadata |= _added(files, table, metadata)
    if "tokenizer.ggml.eos_token_id" not in metadata:
        table.warnings.append("No end-of-text token is known: llama.cpp will take its default, which is some other token.")
    return metadata


def _token(
    kind: str, files: TokenizerFiles, config: Mapping[str, Any], ids: dict[str, int], table: TokenTable
) -> int | None:
    """By text from the tokenizer's files, else by id from the model's (of a list the first) or tokenizer.model's."""
    for source in (files.settings, files.special_map):
        text = _text(source.get(f"{kind}_token"))
        if text in ids:
            return ids[text]
    listed = _listed(kind, files, config, len(ids))
    return listed[0] if listed else table.special.get(kind)


def _text(entry: Any) -> str | None:
    """A token as text, or as an object with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _listed(kind: str, files: TokenizerFiles, config: Mapping[str, Any], num_tokens: int) -> list[int]:
    """Ids in generation_config.json, then config.json (and its text_config), without those that no token has."""
    nested = config.get("text_config")
    found: list[int] = []
    for source in (files.generation, config, nested if isinstance(nested, dict) else {}):
        value = source.get(f"{kind}_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < num_tokens:
                found.append(token)
    return list(dict.fromkeys(found))


def _ends(
    files: TokenizerFiles, config: Mapping[str, Any], table: TokenTable, ids: dict[str, int], eos: int | None
) -> dict[str, Any]:
    """End of turn and of message: by their texts, else what the model's list of ends has that llama.cpp would not know."""
    added = {text for text, token in ids.items() if table.types[token] in (CONTROL, USER_DEFINED)}
    ends = {"eot": [ids[text] for text in _END_OF_TURN if text in added][:1]}
    ends["eom"] = [ids[_END_OF_MESSAGE]] if _END_OF_MESSAGE in added else []
    others = [token for token in _listed("eos", files, config, len(ids)) if token != eos]
    others = [token for token in others if table.texts[token] not in _ALWAYS_ENDS]
    for place in ends.values():
        if not place and others:
            place.append(others.pop(0))
    if others:
        names = ", ".join(repr(table.texts[token]) for token in others)
        table.warnings.append(f"GGUF has no place for these further ends of text: {names}. llama.cpp will not stop at them.")
    return {f"tokenizer.ggml.{name}_token_id": place[0] for name, place in ends.items() if place}


def _added(files: TokenizerFiles, table: TokenTable, metadata: dict[str, Any]) -> dict[str, bool]:
    """add_bos_token and add_eos_token: by tokenizer_config.json, else by the post-processor, else as llama does."""
    flags = {}
    settings = {kind: files.settings.get(f"add_{kind}_token") for kind in ("bos", "eos")}
    around = _template(files.tokenizer)
    for kind, place in (("bos", 0), ("eos", 1)):
        if isinstance(settings["bos"], bool) or isinstance(settings["eos"], bool):
            flag = settings[kind] is True
        elif around is not None:
            flag = _adds(around[place], metadata.get(f"tokenizer.ggml.{kind}_token_id"), table)
        else:
            flag = kind == "bos" and table.model == "llama"
        if flag and f"tokenizer.ggml.{kind}_token_id" not in metadata:
            table.warnings.append(f"The tokenizer adds a {kind} token, but does not say which: none is added.")
            flag = False
        flags[f"tokenizer.ggml.add_{kind}_token"] = flag
    return flags


def _adds(tokens: list[str], expected: int | None, table: TokenTable) -> bool:
    known = [token for token in tokens if expected is not None and table.texts[expected] == token]
    if tokens != known[:1]:
        table.warnings.append(f"The tokenizer adds {' '.join(tokens)} to text; llama.cpp can add one begin and one end token.")
    return bool(known)


def _template(tokenizer: dict[str, Any] | None) -> tuple[list[str], list[str]] | None:
    """The special tokens before and after the text by the post-processor; None where there is none."""
    parts = [(tokenizer or {}).get("post_processor")]
    if parts == [None]:
        return None
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        parts.extend(part["processors"] if isinstance(part.get("processors"), list) else [])
        if part.get("type") == "TemplateProcessing" and isinstance(part.get("single"), list):
            return _around(part["single"])
    return [], []


def _around(single: list[Any]) -> tuple[list[str], list[str]]:
    before: list[str] = []
    after: list[str] = []
    place = before
    for entry in single:
        if isinstance(entry, dict) and "Sequence" in entry:
            place = after
        elif isinstance(entry, dict) and isinstance(entry.get("SpecialToken"), dict):
            place.append(str(entry["SpecialToken"].get("id")))
    return before, after
