"""The tokenizer of a Hugging Face style checkpoint as GGUF metadata, with the ids that the original gives.

Metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, as llama.cpp's llama-vocab.cpp reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.engines.normalizer import COMPOSED, NORMALIZER_KEY
from edgeinfer.errors import ExportError
from edgeinfer.exporters.added_tokens import AddedToken, named_special_tokens, read_added_tokens, text_of
from edgeinfer.exporters.bpe_vocabulary import byte_level_table, is_byte_level, plain_files_table
from edgeinfer.exporters.chat_template import chat_template_metadata
from edgeinfer.exporters.sentencepiece_vocabulary import sentencepiece_table, settle_user_defined
from edgeinfer.exporters.special_tokens import special_token_metadata
from edgeinfer.exporters.token_table import TokenTable, table_size
from edgeinfer.exporters.tokenizer_files import TokenizerFiles, read_tokenizer_files

#: llama.cpp strips spaces after special tokens where the model's name has one of these
#: (llama_vocab::impl::load), except after the tokens that follow; all of them and </s> must then exist.
_STRIPPING_NAME = re.compile(r"phi-?3", re.IGNORECASE)
_NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}


@dataclass(frozen=True)
class Vocabulary:
    """GGUF keys and values; `size` is the number of tokens, that of the model's embedding rows.

    `warnings` (without a last period) say where llama.cpp's ids may differ from the original's. `strips`: the
    original drops spaces after its special tokens as phi 3 does, see `name_for`.
    """

    metadata: dict[str, Any]
    size: int
    warnings: tuple[str, ...] = ()
    strips: bool = False

    def write(self, writer: Any) -> None:
        """Add the metadata to a gguf.GGUFWriter."""
        for key, value in self.metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

    def name_for(self, name: str) -> str:
        """`name` so that general.name makes llama.cpp strip spaces after special tokens, or not, as the
        original does.

        llama.cpp goes by "phi-3" in the name, and fails on such a name where phi 3's tokens are absent.
        """
        if self.strips:
            return name if _STRIPPING_NAME.search(name) else f"{name} (phi-3)"
        return _STRIPPING_NAME.sub("phi 3", name)


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a checkpoint `folder` whose config.json is `config`.

    Raises ExportError: no tokenizer, one that llama.cpp cannot follow (what was found, what is known), or
    damaged files.
    """
    folder = Path(folder)
    files = read_tokenizer_files(folder)
    added = read_added_tokens(files)
    table = _base(files, config, added)
    table.add(str(folder), added)
    table.set_special(named_special_tokens(files))
    if table.model == "llama":
        settle_user_defined(table)
    needed = {text for kind in ("bos", "eos") if (text := text_of(files.settings.get(f"{kind}_token")))}
    table.fit(table_size(config, str(folder / "config.json")), needed, str(folder))
    table.check(str(folder))
    special = special_token_metadata(files, config, table)
    strips = _strips(table, added)
    metadata = _metadata(table) | special | chat_template_metadata(files)
    return Vocabulary(metadata, len(table.texts), tuple(table.warnings), strips)


def _base(files: TokenizerFiles, config: Mapping[str, Any], added: list[AddedToken]) -> TokenTable:
    if files.tokenizer is not None and is_byte_level(files.tokenizer):
        return byte_level_table(files, added)
    if files.tokenizer is not None or files.has("tokenizer.model"):
        return sentencepiece_table(files, added)
    if files.has("vocab.json") and files.has("merges.txt"):
        return plain_files_table(files, config.get("model_type"))
    raise ExportError(
        f"{files.folder}: found no tokenizer. Expected tokenizer.json, tokenizer.model (SentencePiece), or "
        "vocab.json with merges.txt: copy them from where the model came from. From other formats "
        "(tekken.json, tiktoken) transformers makes a tokenizer.json: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )


def _metadata(table: TokenTable) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": table.model,
        "tokenizer.ggml.pre": table.pre,
        "tokenizer.ggml.tokens": table.texts,
        "tokenizer.ggml.token_type": table.types,
    }
    if table.scores is not None:
        metadata["tokenizer.ggml.scores"] = table.scores
    if table.merges is not None:
        metadata["tokenizer.ggml.merges"] = table.merges
    if table.composes:
        metadata[NORMALIZER_KEY] = COMPOSED
    return metadata | {f"tokenizer.ggml.{name}": flag for name, flag in table.flags.items()}


def _strips(table: TokenTable, added: list[AddedToken]) -> bool:
    """Whether the tokens that strip spaces after them are those of phi 3; others get a warning."""
    there = [token for token in added if token.id < len(table.texts)]
    right = {token.text for token in there if token.rstrip}
    phi3 = (
        bool(right)
        and _NOT_STRIPPED < {t.text for t in there}
        and right == {t.text for t in there} - _NOT_STRIPPED
    )
    odd = [token.text for token in there if token.lstrip or token.single_word or (token.rstrip and not phi3)]
    if odd:
        table.warnings.append(
            f"The tokens {', '.join(map(repr, odd[:3]))} take the spaces around them away or match whole "
            "words only; llama.cpp does neither"
        )
    return phi3
