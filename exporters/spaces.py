"""What a SentencePiece-style tokenizer does to text before merging, and what llama.cpp does of that.

Its "llama" tokenizer turns spaces into "▁" and, where it is told so, puts one before the text and after each
special token. That is all that it can do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.token_table import SPACE

_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_START = (
    "Text that begins with a space: transformers puts no second one before it, llama.cpp (and "
    "SentencePiece) does, so its first ids differ"
)
_AFTER = (
    "Text after a special token: transformers puts a space only before the whole text, llama.cpp also "
    "after special tokens, so ids there may differ"
)


@dataclass(frozen=True)
class Spaces:
    """`prefix`: a space is put before the text. `warnings`: where llama.cpp does it differently."""

    prefix: bool
    warnings: tuple[str, ...] = ()


def spaces_of_model(model: Any, where: str) -> Spaces:
    """From the normalizer of a SentencePiece ModelProto."""
    spec = model.normalizer_spec
    if not spec.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        raise ExportError(
            f"{where}: the SentencePiece model marks spaces differently (escape_whitespaces off, or "
            "treat_whitespace_as_suffix), which llama.cpp cannot do."
        )
    warnings = []
    if spec.precompiled_charsmap:
        warnings.append(
            f"The SentencePiece model normalizes characters ({spec.name or 'its own rules'}); llama.cpp "
            "does not. Text that this changes (perhaps line breaks, ligatures, full-width letters, "
            "decomposed accents) gets other ids"
        )
    if spec.remove_extra_whitespaces:
        warnings.append(
            "The SentencePiece model drops spaces at the ends and repeated ones; llama.cpp keeps them. "
            "Such text gets other ids"
        )
    return Spaces(spec.add_dummy_prefix, tuple(warnings))


def hides_added_tokens(tokenizer: dict[str, Any], normalized: bool) -> bool:
    """Whether added tokens are looked for with a "▁" before them, as the normalizer puts one there."""
    parts = _flat(tokenizer.get("normalizer"), "normalizers")
    return normalized and any(part.get("type") == "Prepend" for part in parts)


def spaces_of_json(tokenizer: dict[str, Any], texts: list[str], where: str) -> Spaces:
    """By normalizer and pre_tokenizer of a tokenizer.json with tokens `texts`; ExportError for others."""
    prefix, marks = False, False
    for part in _flat(tokenizer.get("normalizer"), "normalizers"):
        if part == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif part == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            marks = True
        else:
            raise _unknown(where, "normalizer", part)
    warnings: tuple[str, ...] = ()
    for part in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace" and part.get("replacement", SPACE) == SPACE:
            scheme = _scheme(part)
            _check_words(part, texts, where)
            prefix, marks = prefix or scheme != "never", True
            warnings = {"never": (), "always": (_START,), "first": (_START, _AFTER)}.get(scheme, ())
        elif not (marks and _splits_at_spaces(part)):
            raise _unknown(where, "pre_tokenizer", part)
    if not marks:
        raise ExportError(
            f"{where}: spaces are not turned into {SPACE!r}, which llama.cpp's SentencePiece tokenizer does."
        )
    return Spaces(prefix, warnings)


def spaces_of_class(spaces: Spaces, settings: dict[str, Any]) -> Spaces:
    """As transformers' LlamaTokenizer does by tokenizer_config.json; since version 5 no other file counts."""
    if settings.get("tokenizer_class") not in _LLAMA:
        return spaces
    if settings.get("add_prefix_space") is False:
        return Spaces(False, spaces.warnings)
    late = (_START,) if settings.get("legacy") is True else (_START, _AFTER)
    return Spaces(True, tuple(dict.fromkeys((*spaces.warnings, *late))))


def _scheme(metaspace: dict[str, Any]) -> str:
    """Older files say add_prefix_space only."""
    adds = metaspace.get("add_prefix_space", True)
    return metaspace.get("prepend_scheme") or ("always" if adds else "never")


def _check_words(metaspace: dict[str, Any], texts: list[str], where: str) -> None:
    """llama.cpp does not split at spaces before merging: no token may then reach over one."""
    across = next((text for text in texts if SPACE in text[1:]), None)
    if metaspace.get("split", True) and across is not None:
        raise ExportError(
            f"{where}: Metaspace splits text at spaces, but the token {across!r} reaches over one. "
            "llama.cpp would use it, the original never does."
        )


def _splits_at_spaces(part: dict[str, Any]) -> bool:
    """gemma's pre-tokenizer, which finds none: the normalizer has replaced them."""
    return part.get("type") == "Split" and part.get("pattern") == {"String": " "}


def _flat(part: Any, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get(inner), list):
        return [leaf for item in part[inner] for leaf in _flat(item, inner)]
    return [part if isinstance(part, dict) else {"type": str(part)[:80]}]


def _unknown(where: str, name: str, part: dict[str, Any]) -> ExportError:
    return ExportError(
        f"{where}: the {name} {json.dumps(part, ensure_ascii=False)[:200]} changes text in a way that "
        f"llama.cpp's SentencePiece tokenizer cannot. Expected spaces to become {SPACE!r}, and perhaps one "
        "before the text."
    )
