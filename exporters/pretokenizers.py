"""llama.cpp's name for how a byte-level tokenizer cuts text into words, by the definition in tokenizer.json.

pretokenizers.json lists what llama.cpp knows (llm_tokenizer_bpe in its llama-vocab.cpp): the steps of the
pre-tokenizer as in tokenizer.json, whether a whole word that is a token is taken without merging
(`ignore_merges`), and, where llama.cpp's own splitter is known to differ from the regex, in what.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeinfer.errors import ExportError

_KNOWN = Path(__file__).with_name("pretokenizers.json")
_ISOLATED, _MATCHES_ONLY = ("Isolated", False), ("Removed", True)


@dataclass(frozen=True)
class PreTokenizer:
    """`name` is the value of tokenizer.ggml.pre."""

    name: str
    steps: tuple[tuple[str, str], ...]
    ignore_merges: bool = False
    nfc: bool = False
    classes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    differs: str | None = None


@cache
def known_pretokenizers() -> tuple[PreTokenizer, ...]:
    """In the order in which they are tried."""
    entries = json.loads(_KNOWN.read_text(encoding="utf-8"))
    return tuple(_known(entry) for entry in entries)


def _known(entry: dict[str, Any]) -> PreTokenizer:
    steps = tuple((kind, value) for step in entry.pop("steps") for kind, value in step.items())
    names = {key: tuple(entry.pop(key, ())) for key in ("classes", "models")}
    return PreTokenizer(steps=steps, **names, **entry)


def recognise(
    definition: Any, ignore_merges: bool, nfc: bool, reaches_all: Callable[[], bool], where: str
) -> PreTokenizer:
    """The known pre-tokenizer with the steps of `definition` (pre_tokenizer in tokenizer.json).

    `reaches_all()` tells whether merging reaches every token from its own text: then ignore_merges does not
    matter, and an entry that differs in it will do. Raises ExportError with the regexes found for one that is
    not known.
    """
    steps = tuple(_steps(definition, where))
    same = [known for known in known_pretokenizers() if known.steps == steps]
    if not same:
        raise ExportError(_unknown(steps, where))
    exact = [known for known in same if known.ignore_merges == ignore_merges]
    if not exact and not reaches_all():
        raise ExportError(
            f"{where}: llama.cpp's {same[0].name!r} cuts text like this tokenizer, but ignore_merges is "
            f"{ignore_merges} here and not there, which changes ids. There is no such tokenizer in "
            "llama.cpp."
        )
    best = exact or same
    return next((known for known in best if known.nfc == nfc), best[0])


def recognise_class(name: Any, model_type: Any, where: str) -> PreTokenizer:
    """For vocab.json with merges.txt: they do not say how text is cut, the class in transformers does.

    Without a class the model's type (config.json) tells it, as for transformers.
    """
    for known in known_pretokenizers():
        if name in known.classes or (name is None and model_type in known.models):
            return known
    classes = sorted(name for known in known_pretokenizers() for name in known.classes)
    raise ExportError(
        f"{where}: vocab.json and merges.txt do not say how text is cut into words, and the tokenizer class "
        f"is {name or 'not given'}; expected one of {', '.join(classes)}. A tokenizer.json would tell: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one."
    )


def _steps(definition: Any, where: str) -> list[tuple[str, str]]:
    """The definition as a flat list of (kind, value)."""
    parts = list(_flat(definition, where))
    return [_step(part, len(parts), where) for part in parts]


def _flat(definition: Any, where: str) -> list[dict[str, Any]]:
    if definition is None:
        return []
    if not isinstance(definition, dict) or not isinstance(definition.get("type"), str):
        raise ExportError(f"{where}: expected an object with a type, found {str(definition)[:80]}.")
    if definition["type"] != "Sequence":
        return [definition]
    inner = definition.get("pretokenizers")
    if not isinstance(inner, list):
        raise ExportError(f"{where}: a Sequence without a list of pretokenizers.")
    return [part for item in inner for part in _flat(item, where)]


def _step(part: dict[str, Any], num_steps: int, where: str) -> tuple[str, str]:
    kind = part["type"]
    if kind == "Split":
        return "Split", _split_regex(part, num_steps, where)
    if kind == "Digits":
        return "Digits", "individual" if part.get("individual_digits") else "contiguous"
    if kind == "Punctuation":
        return "Punctuation", str(part.get("behavior", "Isolated"))
    if kind == "ByteLevel":
        if part.get("add_prefix_space", True):
            raise ExportError(
                f"{where}: ByteLevel adds a space before the text, which llama.cpp cannot do here."
            )
        return "ByteLevel", "regex" if part.get("use_regex", True) else "bytes only"
    return kind, json.dumps({key: value for key, value in part.items() if key != "type"}, sort_keys=True)


def _split_regex(part: dict[str, Any], num_steps: int, where: str) -> str:
    """The regex of a Split that keeps matches whole; with one Split, all that it matches is all there is."""
    pattern = part.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    way = (part.get("behavior"), bool(part.get("invert")))
    if not isinstance(regex, str) or not (way == _ISOLATED or way == _MATCHES_ONLY and num_steps <= 2):
        raise ExportError(
            f"{where}: a Split with behavior {way[0]}, invert {way[1]} and {str(pattern)[:200]}; "
            "expected a Regex whose matches are Isolated. llama.cpp has no such pre-tokenizer."
        )
    return regex


def _unknown(steps: tuple[tuple[str, str], ...], where: str) -> str:
    found = "\n".join(f"  {kind}: {value}" for kind, value in steps) or "  (none)"
    names = ", ".join(dict.fromkeys(known.name for known in known_pretokenizers()))
    return (
        f"{where}: this pre-tokenizer is not known, so llama.cpp would cut text differently. Found the "
        f"steps\n{found}\nKnown are those of {names}. If llama.cpp has one that does the same, add it to "
        f"{_KNOWN.name}."
    )
