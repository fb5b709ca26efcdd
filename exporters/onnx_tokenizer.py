"""The files of a checkpoint's tokenizer, which travel with its ONNX model."""

from __future__ import annotations

import shutil
from pathlib import Path

#: What programs look for beside a model: how text becomes tokens, how a chat is written, where text ends.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_MAIN = "tokenizer.json"
_SOURCES = ("tokenizer.model", "vocab.json", "vocab.txt")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files to the folder `target`, and make tokenizer.json where only an older form is there.
    Notes.
    """
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (target / _MAIN).is_file() or not any((target / name).is_file() for name in _SOURCES):
        return []
    try:
        _make(source, target)
    except Exception as error:  # tokenizers raise errors of many kinds for what they cannot convert
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return [f"no tokenizer.json could be made of the tokenizer's files: {words}"]
    return []


def _make(source: Path, target: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False, use_fast=True
    )
    tokenizer.backend_tokenizer.save(str(target / _MAIN))
