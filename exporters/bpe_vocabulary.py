"""Byte-level BPE (tokenizer.json, or vocab.json with merges.txt) as llama.cpp's "gpt2" tokenizer."""

from __future__ import annotations

from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.added_tokens import AddedToken
from edgeinfer.exporters.pretokenizers import PreTokenizer, recognise, recognise_class
from edgeinfer.exporters.token_table import NORMAL, TokenTable, base_tokens
from edgeinfer.exporters.tokenizer_files import TokenizerFiles, read_object, read_text

Merge = tuple[str, str]
_MAX_MERGES = 1 << 21
_UTF8_BYTES = [byte for byte in range(256) if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
#: Of letters that stand for no byte: llama.cpp wants a list of merges, and GGUF has no empty lists.
_NO_MERGE = "\uffff \uffff"


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer of a tokenizer.json turns bytes into letters, as GPT-2's does."""
    parts = [tokenizer.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") == "ByteLevel":
                return True
            inner = part.get("pretokenizers")
            parts.extend(inner if isinstance(inner, list) else [])
    return False


def byte_level_table(files: TokenizerFiles, added: list[AddedToken]) -> TokenTable:
    """From tokenizer.json, without its `added` tokens.

    Raises ExportError for what llama.cpp cannot do, and for a file that contradicts itself.
    """
    where = str(files.path("tokenizer.json"))
    tokenizer = files.tokenizer or {}
    model = model_of(tokenizer, where)
    texts = base_tokens(f"{where}: vocab", model.get("vocab"))
    merges = read_merges(f"{where}: merges", model.get("merges"), texts)
    ignore_merges = bool(model.get("ignore_merges"))
    nfc = _normalizes(tokenizer.get("normalizer"), where)
    pre = recognise(
        tokenizer.get("pre_tokenizer"),
        ignore_merges,
        nfc,
        lambda: _reaches_all(texts, merges, {token.text for token in added}),
        f"{where}: pre_tokenizer",
    )
    return _table(pre, texts, merges, nfc)


def plain_files_table(files: TokenizerFiles, model_type: Any) -> TokenTable:
    """From vocab.json and merges.txt, for the tokenizer classes that pretokenizers.json names."""
    where = str(files.path("vocab.json"))
    texts = base_tokens(where, read_object(files.path("vocab.json")))
    lines = read_text(files.path("merges.txt")).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    merges = read_merges(
        str(files.path("merges.txt")), [line.rstrip("\r") for line in lines if line.strip()], texts
    )
    where = str(files.path("tokenizer_config.json"))
    pre = recognise_class(files.settings.get("tokenizer_class"), model_type, where)
    return _table(pre, texts, merges, nfc=pre.nfc)


def _table(pre: PreTokenizer, texts: list[str], merges: list[Merge], nfc: bool) -> TokenTable:
    table, known = TokenTable("gpt2", pre.name, texts, [NORMAL] * len(texts)), set(texts)
    table.merges = [f"{left} {right}" for left, right in merges] or [_NO_MERGE]
    if nfc:
        table.composes = True
        table.warnings.append(
            "The tokenizer composes accents first (Unicode NFC). edgeinfer does too; in other programs on "
            "llama.cpp text with decomposed accents (a letter followed by a combining mark) gets other ids, "
            "unless it is normalized before"
        )
    if pre.differs:
        table.warnings.append(
            f"llama.cpp's splitter for {pre.name!r} differs from the original: {pre.differs}"
        )
    letters = byte_letters()
    absent = [byte for byte in _UTF8_BYTES if letters[byte] not in known]
    if absent:
        table.warnings.append(
            f"{len(absent)} bytes have no token of their own (the first is 0x{absent[0]:02X}). Text with "
            "them loses them, and ids around them may differ"
        )
    return table


def model_of(tokenizer: dict[str, Any], where: str) -> dict[str, Any]:
    """The "model" of a tokenizer.json, which must be a BPE that llama.cpp can follow."""
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise ExportError(
            f"{where}: has no model. Expected a tokenizer.json as the tokenizers library writes it."
        )
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise ExportError(f"{where}: the tokenizer's model is {kind}, expected BPE.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ExportError(
                f"{where}: the BPE model sets {name} to {str(model[name])[:40]!r}, which llama.cpp lacks."
            )
    return model


def read_merges(where: str, entries: Any, texts: list[str]) -> list[Merge]:
    """Merges as pairs, the first is applied first; a repeated one counts where it is last.

    They are written as "a b" or as ["a", "b"]. Raises ExportError for what is no pair, and where a part
    or the result is no token.
    """
    if not isinstance(entries, list):
        raise ExportError(f"{where}: expected a list of merges, found {type(entries).__name__}.")
    if len(entries) > _MAX_MERGES:
        raise ExportError(f"{where}: has {len(entries):,} merges, at most {_MAX_MERGES:,} are allowed.")
    known = set(texts)
    merges: dict[Merge, None] = {}
    for number, entry in enumerate(entries):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        pair = tuple(parts) if isinstance(parts, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ExportError(f"{where}: merge {number} is {str(entry)[:80]!r}, expected two tokens.")
        missing = next((text for text in (*pair, pair[0] + pair[1]) if text not in known), None)
        if missing is not None:
            raise ExportError(
                f"{where}: merge {number}, {str(entry)[:80]!r}, needs the token {missing!r}, which is not "
                "there."
            )
        merges.pop(pair, None)
        merges[pair] = None
    return list(merges)


def _normalizes(normalizer: Any, where: str) -> bool:
    """Whether text is put into NFC first. ExportError for other normalizers: llama.cpp's "gpt2" has none."""
    if normalizer is None:
        return False
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    if kind == "NFC":
        return True
    if kind == "Sequence" and isinstance(normalizer.get("normalizers"), list):
        return any([_normalizes(part, where) for part in normalizer["normalizers"]])
    raise ExportError(
        f"{where}: the normalizer {kind or str(normalizer)[:80]} changes text in a way that llama.cpp cannot."
    )


def _reaches_all(texts: list[str], merges: list[Merge], added: set[str]) -> bool:
    """Whether merging the letters of every token but the `added` ones gives that token."""
    try:
        from tokenizers.models import BPE
    except ImportError:
        raise ExportError(
            'Exporting this tokenizer needs the package tokenizers: pip install "edgeinfer[export]"'
        ) from None
    bpe = BPE(vocab={text: token for token, text in enumerate(texts)}, merges=merges)
    letters = set(byte_letters())
    words = (text for text in texts if letters.issuperset(text) and text not in added)
    return all(len(bpe.tokenize(word)) == 1 for word in words)


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable Latin-1 is itself, others are U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
