"""The chat template of a checkpoint as GGUF metadata. It is copied as text and never run here."""

from __future__ import annotations

from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.tokenizer_files import TokenizerFiles, is_utf8, read_object, read_text

_KEY = "tokenizer.chat_template"
_MAX_CHARACTERS = 1 << 20
_MAX_TEMPLATES = 64


def chat_template_metadata(files: TokenizerFiles) -> dict[str, Any]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME for further ones, listed in chat_templates.

    As transformers: chat_template.jinja (and additional_chat_templates/NAME.jinja) before chat_template.json
    before tokenizer_config.json. Raises ExportError for templates that are no text.
    """
    where, templates = _templates(files)
    if len(templates) > _MAX_TEMPLATES:
        raise ExportError(
            f"{where}: has {len(templates)} chat templates, at most {_MAX_TEMPLATES} are allowed."
        )
    for name, template in templates.items():
        if not isinstance(template, str) or len(template) > _MAX_CHARACTERS or not is_utf8(template):
            raise ExportError(
                f"{where}: the chat template {name!r} is no Unicode text of at most {_MAX_CHARACTERS:,} "
                "characters."
            )
    metadata: dict[str, Any] = {}
    default = templates.pop("default", None)
    if default is not None:
        metadata[_KEY] = default
    for name, template in templates.items():
        metadata[f"{_KEY}.{_plain(name)}"] = template
    if templates:
        metadata[f"{_KEY}s"] = [_plain(name) for name in templates]
    return metadata


def _templates(files: TokenizerFiles) -> tuple[str, dict[str, Any]]:
    """Where the templates stand, and the templates by name; the usual one is "default"."""
    path = files.path("chat_template.jinja")
    folder = files.path("additional_chat_templates")
    further = sorted(folder.glob("*.jinja"))[: _MAX_TEMPLATES + 1] if folder.is_dir() else []
    if path.is_file() or further:
        named = {part.stem: read_text(part) for part in further}
        return str(path), ({"default": read_text(path)} if path.is_file() else {}) | named
    path = files.path("chat_template.json")
    inside = read_object(path)
    if inside is None or inside.get("chat_template") is None:
        path, inside = files.path("tokenizer_config.json"), files.settings
    return str(path), _named(str(path), inside.get("chat_template"))


def _named(where: str, template: Any) -> dict[str, Any]:
    """A template, or a list of {"name": ..., "template": ...}."""
    if template is None:
        return {}
    if not isinstance(template, list):
        return {"default": template}
    named = {}
    for entry in template:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ExportError(
                f"{where}: a chat template in a list needs a name and a template, found {str(entry)[:80]}."
            )
        named[entry["name"]] = entry.get("template")
    return named


def _plain(name: str) -> str:
    """A name that can be part of a GGUF key."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
