"""Which tokens begin and end text, as GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeinfer.exporters.added_tokens import text_of
from edgeinfer.exporters.token_table import CONTROL, USER_DEFINED, TokenTable
from edgeinfer.exporters.tokenizer_files import TokenizerFiles

_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
#: Names that transformers' tokenizer classes assume where the files give none.
_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}
#: What ends a turn, by text, the most telling first.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<EOT>", "[EOT]")
_END_OF_MESSAGE = "<|eom_id|>"
#: llama.cpp stops at these whatever the metadata says (llama_vocab::impl::load).
_ALWAYS_ENDS = {*_END_OF_TURN, _END_OF_MESSAGE, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]"}


@dataclass(frozen=True)
class _Source:
    files: TokenizerFiles
    config: Mapping[str, Any]
    table: TokenTable
    ids: dict[str, int]

    def is_added(self, text: str) -> bool:
        return text in self.ids and self.table.types[self.ids[text]] in (CONTROL, USER_DEFINED)

    def token(self, kind: str) -> int | None:
        """By text in the tokenizer's files, by id in the model's, in tokenizer.model, by the usual name."""
        for settings in (self.files.settings, self.files.special_map):
            text = text_of(settings.get(f"{kind}_token"))
            if text in self.ids:
                return self.ids[text]
        for token in self.listed(kind):
            return token
        if kind in self.table.special:
            return self.table.special[kind]
        return next((self.ids[text] for text in _USUAL.get(kind, ()) if self.is_added(text)), None)

    def listed(self, kind: str) -> list[int]:
        """Ids in generation_config.json, config.json and its text_config, without those that no token has."""
        nested = self.config.get("text_config")
        found: list[int] = []
        for settings in (self.files.generation, self.config, nested if isinstance(nested, dict) else {}):
            value = settings.get(f"{kind}_token_id")
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < len(self.ids):
                    found.append(token)
        return list(dict.fromkeys(found))


def special_token_metadata(
    files: TokenizerFiles, config: Mapping[str, Any], table: TokenTable
) -> dict[str, Any]:
    """Ids of begin, end, unknown, padding, end of turn and of message; whether begin and end are added."""
    source = _Source(files, config, table, table.ids())
    tokens = {kind: source.token(kind) for kind in _KEYS}
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{key}": tokens[kind] for kind, key in _KEYS.items() if tokens[kind] is not None
    }
    if tokens["eos"] is None:
        table.warnings.append(
            "No end-of-text token is known: llama.cpp will take its default, which is some other token"
        )
    metadata |= _further_ends(source, tokens["eos"])
    return metadata | _added_to_text(source, tokens)


def _further_ends(source: _Source, eos: int | None) -> dict[str, int]:
    """End of turn and of message: by text, else ends that the model lists and llama.cpp would not know."""
    turn = [source.ids[text] for text in _END_OF_TURN if source.is_added(text)][:1]
    message = [source.ids[_END_OF_MESSAGE]] if source.is_added(_END_OF_MESSAGE) else []
    texts = source.table.texts
    others = [token for token in source.listed("eos") if token != eos and texts[token] not in _ALWAYS_ENDS]
    for place in (turn, message):
        if not place and others:
            place.append(others.pop(0))
    if others:
        names = ", ".join(repr(texts[token]) for token in others)
        source.table.warnings.append(
            f"GGUF has no place for these further ends of text: {names}. llama.cpp will not stop at them"
        )
    places = {"eot": turn, "eom": message}
    return {f"tokenizer.ggml.{name}_token_id": place[0] for name, place in places.items() if place}


def _added_to_text(source: _Source, tokens: dict[str, int | None]) -> dict[str, bool]:
    """add_bos_token and add_eos_token as transformers 5 does: by tokenizer.json, else by the settings."""
    around = _template(source.files.tokenizer)
    flags = {}
    for kind in ("bos", "eos"):
        setting = source.files.settings.get(f"add_{kind}_token")
        if around is not None:
            flag = _adds(around[kind], tokens[kind], source.table)
        else:
            flag = setting is True and tokens[kind] is not None
        if setting is True and not flag:
            why = "tokenizer.json does not" if around is not None else "no file says which that is"
            source.table.warnings.append(
                f"tokenizer_config.json adds a {kind} token to text, but {why}: none is added (as by "
                "transformers 5)"
            )
        flags[f"tokenizer.ggml.add_{kind}_token"] = flag
    if (
        around is None
        and source.files.settings.get("add_bos_token") is None
        and source.table.model == "llama"
    ):
        source.table.warnings.append(
            "No file says whether text begins with a bos token: none is added (as by transformers 5; version 4 "
            "added it)"
        )
    return flags


def _adds(texts: list[str], token: int | None, table: TokenTable) -> bool:
    """Whether the `texts` that a post-processor adds at one end are that token."""
    adds = token is not None and table.texts[token] in texts
    if len(texts) > adds:
        table.warnings.append(
            f"The tokenizer puts {' '.join(texts)} around text; llama.cpp can add one begin and one end "
            "token only"
        )
    return adds


def _template(tokenizer: dict[str, Any] | None) -> dict[str, list[str]] | None:
    """The special tokens that tokenizer.json puts before ("bos") and after ("eos") text, if it is there."""
    if tokenizer is None:
        return None
    parts = [tokenizer.get("post_processor")]
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        parts.extend(part["processors"] if isinstance(part.get("processors"), list) else [])
        if part.get("type") == "TemplateProcessing" and isinstance(part.get("single"), list):
            return _around(part["single"])
    return {"bos": [], "eos": []}


def _around(single: list[Any]) -> dict[str, list[str]]:
    around: dict[str, list[str]] = {"bos": [], "eos": []}
    place = "bos"
    for entry in single:
        if isinstance(entry, dict) and "Sequence" in entry:
            place = "eos"
        elif isinstance(entry, dict) and isinstance(entry.get("SpecialToken"), dict):
            around[place].append(str(entry["SpecialToken"].get("id")))
    return around
