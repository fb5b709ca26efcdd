"""The models that come with edgeinfer."""

from pathlib import Path

__all__ = ["default_model_path"]


def default_model_path() -> Path:
    """The embedded default model: a small story writer of our own (story.md tells how it was made)."""
    return Path(__file__).with_name("story.gguf")
