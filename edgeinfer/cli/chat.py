"""The conversation of `edgeinfer run` on a terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import Any

import click

import edgeinfer
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.errors import PromptError

_ROOM_FOR_THE_ANSWER = 0.25  # of the context


def chat(model: edgeinfer.Model, options: dict[str, Any]) -> None:
    """Ask for lines and answer them until Ctrl-D. Ctrl-C stops an answer."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and the lines typed before)
    if not model.has_chat_template:
        _note("This model has no chat template: it continues your text.")
    _note("Ctrl-C stops an answer, Ctrl-D leaves.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            _note("Ctrl-D leaves.")
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            forget_oldest(model, messages)
            answer = _answer(model, messages, options)
        except PromptError as error:
            _note(str(error))
            answer = ""
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()


def _answer(model: edgeinfer.Model, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Show the answer as it comes; gives what was shown, also when Ctrl-C stopped it."""
    shown: list[str] = []
    with ProgressLine("Reading the prompt") as progress:
        try:
            with closing(model.chat(messages, progress=progress, **options)) as pieces:
                for piece in pieces:
                    progress.done()
                    shown.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            click.echo()
            if model.finish == "context":
                _note(f"The context of {model.context_length:,} tokens is full; --ctx sets its size.")
        except KeyboardInterrupt:
            progress.done()
            _note(" Stopped.")
    return "".join(shown)


def forget_oldest(model: edgeinfer.Model, messages: list[dict[str, str]]) -> None:
    """Drop the oldest questions and answers until a quarter of the context is free for the next answer."""
    limit = int(model.context_length * (1 - _ROOM_FOR_THE_ANSWER))
    forgotten = 0
    while len(messages) > 1 and len(model.chat_tokens(messages)) > limit:
        del messages[:2]
        forgotten += 2
    if forgotten:
        _note(f"The context of {model.context_length:,} tokens is full: the oldest turns are forgotten.")


def _note(text: str) -> None:
    click.secho(text, err=True, dim=True)
