"""SentencePiece BPE with byte fallback (llama 2, mistral, gemma, phi 3) as llama.cpp's "llama" tokenizer.

From tokenizer.model, or from a tokenizer.json that was made from one. llama.cpp merges the neighbours whose
union is the token of the highest score, the leftmost first, as SentencePiece does; bytes stand for characters
without a token.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.added_tokens import AddedToken
from edgeinfer.exporters.bpe_vocabulary import Merge, model_of, read_merges
from edgeinfer.exporters.spaces import (
    Spaces,
    hides_added_tokens,
    spaces_of_class,
    spaces_of_json,
    spaces_of_model,
)
from edgeinfer.exporters.token_table import (
    BYTE,
    MAX_CHARACTERS,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    TokenTable,
    base_tokens,
)
from edgeinfer.exporters.tokenizer_files import AGAIN, MAX_TOKENS, TokenizerFiles, read_bytes

_BPE = 2  # TrainerSpec.ModelType
_NEVER = -1e9  # the score of a token that no merge makes


def sentencepiece_table(files: TokenizerFiles, added: list[AddedToken]) -> TokenTable:
    """The base tokens; `added` ones are put in by the caller, then `settle_user_defined` is due.

    tokenizer.model gives scores where it agrees with tokenizer.json, which else is what transformers reads.
    Raises ExportError for a kind of SentencePiece model that llama.cpp's "llama" tokenizer is not.
    """
    table, spaces = _from_model(files) if files.has("tokenizer.model") else _from_json(files)
    if files.tokenizer is not None and files.has("tokenizer.model"):
        if _same_tokens(table, files, added):
            spaces = spaces_of_json(files.tokenizer, table.texts, str(files.path("tokenizer.json")))
        else:
            table, spaces = _from_json(files)
            table.warnings.append(
                "tokenizer.model holds other tokens than tokenizer.json. The latter was used"
            )
    if files.tokenizer is not None and hides_added_tokens(files.tokenizer, any(t.normalized for t in added)):
        table.warnings.append(
            "tokenizer.json finds added tokens that are normalized only at the start of text or after a "
            "space; llama.cpp finds them everywhere"
        )
    spaces = spaces_of_class(spaces, files.settings)
    table.flags["add_space_prefix"] = spaces.prefix
    table.warnings.extend(spaces.warnings)
    return table


def _same_tokens(table: TokenTable, files: TokenizerFiles, added: list[AddedToken]) -> bool:
    """Whether tokenizer.json has the pieces of tokenizer.model, and no others but added tokens."""
    vocabulary = model_of(files.tokenizer or {}, str(files.path("tokenizer.json"))).get("vocab")
    ids = vocabulary if isinstance(vocabulary, dict) else {}
    known = {*table.texts, *(token.text for token in added)}
    pieces = zip(table.texts, table.types)
    return known.issuperset(ids) and all(
        ids.get(text) == token for token, (text, kind) in enumerate(pieces) if kind == NORMAL
    )


def _from_model(files: TokenizerFiles) -> tuple[TokenTable, Spaces]:
    path = files.path("tokenizer.model")
    model = _parse(path, read_bytes(path))
    if model.trainer_spec.model_type != _BPE:
        kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        raise ExportError(
            f"{path}: is a SentencePiece model of type {kind}, expected BPE as llama, mistral and gemma have."
        )
    texts = _texts(path, model)
    table = TokenTable("llama", "default", texts, [piece.type for piece in model.pieces])
    table.scores = [piece.score for piece in model.pieces]
    if not all(map(isfinite, table.scores)):
        raise ExportError(f"{path}: a piece has a score that is no number. {AGAIN}")
    spec = model.trainer_spec
    places = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    table.special = {kind: token for kind, token in places.items() if 0 <= token < len(texts)}
    _check_bytes(str(path), table)
    return table, spaces_of_model(model, str(path))


def _texts(path: Path, model: Any) -> list[str]:
    if len(model.pieces) > MAX_TOKENS:
        raise ExportError(f"{path}: has {len(model.pieces):,} pieces, at most {MAX_TOKENS:,} are allowed.")
    texts = [piece.piece for piece in model.pieces]
    if not all(isinstance(text, str) and len(text) <= MAX_CHARACTERS for text in texts):
        raise ExportError(
            f"{path}: a piece is not UTF-8 text of at most {MAX_CHARACTERS:,} characters. {AGAIN}"
        )
    return texts


def _parse(path: Path, data: bytes) -> Any:
    """A sentencepiece ModelProto."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ExportError(f'{path}: reading it needs {error.name}: pip install "edgeinfer[export]"') from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        tiktoken = "It is in tiktoken's format: add the tokenizer.json to the folder."
        hint = tiktoken if _is_tiktoken(data) else AGAIN
        raise ExportError(f"{path}: is not a SentencePiece model. {hint}")
    return model


def _is_tiktoken(data: bytes) -> bool:
    """Lines of base64 and a rank."""
    parts = data[:200].split(b"\n")[0].split(b" ")
    return len(parts) == 2 and parts[1].isdigit()


def _from_json(files: TokenizerFiles) -> tuple[TokenTable, Spaces]:
    where = str(files.path("tokenizer.json"))
    tokenizer = files.tokenizer or {}
    model = model_of(tokenizer, where)
    texts = base_tokens(f"{where}: vocab", model.get("vocab"))
    merges = read_merges(f"{where}: merges", model.get("merges"), texts)
    if not model.get("byte_fallback"):
        raise ExportError(
            f"{where}: the tokenizer is neither byte-level (a ByteLevel pre-tokenizer) nor has it "
            "byte_fallback; llama.cpp has no such BPE."
        )
    table = TokenTable("llama", "default", texts, _types(texts, model.get("unk_token")))
    table.scores = scores_of_merges(texts, merges)
    table.special = {"unk": table.types.index(UNKNOWN)} if UNKNOWN in table.types else {}
    _check_bytes(where, table)
    different = num_inexact(texts, merges)
    if different:
        table.warnings.append(
            f"{different:,} merges of this tokenizer cannot be written as scores of tokens; rare words get "
            "other ids"
        )
    return table, spaces_of_json(tokenizer, texts, where)


def _types(texts: list[str], unknown: Any) -> list[int]:
    bytes_ = set(_byte_texts())
    return [UNKNOWN if text == unknown else BYTE if text in bytes_ else NORMAL for text in texts]


def scores_of_merges(texts: list[str], merges: list[Merge]) -> list[float]:
    """A token's score is minus the rank of the first merge that makes it, so that earlier merges win."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    return [scores.get(text, 0.0 if len(text) == 1 else _NEVER) for text in texts]


def num_inexact(texts: list[str], merges: list[Merge]) -> int:
    """How many merges llama.cpp would do more, or in another order, than `merges` says.

    It joins any two neighbours whose union is a token, so each such pair must be a merge, and the merges that
    make one token must follow each other. Both are so where the merges were made from a SentencePiece model.
    Runs of one character (gemma's spaces and newlines) share their places, which does no harm: the longest
    run wins either way.
    """
    known, listed = set(texts), set(merges)
    made = [left + right for left, right in merges if len(set(left + right)) > 1]
    more = sum(
        (text[:cut], text[cut:]) not in listed
        for text in set(made)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )
    changes = sum(text != before for text, before in zip(made, [None, *made]))
    return more + changes - len(set(made))


def _check_bytes(where: str, table: TokenTable) -> None:
    """llama.cpp ends the process at a character without a token where its bytes have none."""
    known = set(table.texts)
    absent = [byte for byte, text in enumerate(_byte_texts()) if text not in known]
    absent = [byte for byte in absent if byte > 0x7F or chr(byte) not in known]
    if absent:
        raise ExportError(
            f"{where}: has no token for {len(absent)} of the 256 bytes (the first is <0x{absent[0]:02X}>). "
            "llama.cpp needs them for characters without a token: train the tokenizer with byte_fallback."
        )


def _byte_texts() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def settle_user_defined(table: TokenTable) -> None:
    """Tokens that are looked for in the text as written, before spaces become "▁".

    One that merging reaches anyway becomes a normal token, so that it is printed with spaces (gemma's runs of
    spaces); another gets spaces for its "▁".
    """
    known = set(table.texts)
    for token, text in enumerate(table.texts):
        if table.types[token] != USER_DEFINED or SPACE not in text:
            continue
        if set(text) == {SPACE} and text[1:] in known:
            table.types[token] = NORMAL
        elif text.replace(SPACE, " ") not in known:
            table.texts[token] = text.replace(SPACE, " ")
