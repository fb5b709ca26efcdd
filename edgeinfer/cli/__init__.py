"""The command `edgeinfer`: one module a command, imported only when it is used.

Exit codes: 0 done (also when the reader of a pipe has seen enough), 1 an error that edgeinfer explains,
2 a command line that cannot be read, 130 stopped by Ctrl-C, 143 or 129 by SIGTERM or SIGHUP.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import TextIO

import click

from edgeinfer import __version__
from edgeinfer.cli.termination import Terminated
from edgeinfer.errors import EdgeInferError

#: Name -> what the list of commands says, so that showing the list imports none of them.
COMMANDS = {
    "run": "Let a GGUF model write or chat, or run an ONNX model, within a memory budget.",
    "plan": "Show where each part of a model goes, and how fast that is.",
    "inspect": "Show what is in a GGUF or ONNX model file.",
    "export": "Turn a checkpoint or an ONNX file into a model made for streaming.",
    "quantize": "Make a model smaller, and say what that costs.",
    "layout": "Rewrite a GGUF file so that it streams well.",
    "stream": "Feed a sound, a video or live input to ONNX models as it arrives.",
    "trace": "Record which experts a mixture-of-experts model uses.",
    "replay": "Judge cache policies and predictors by a recorded trace.",
}

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Commands(click.Group):
    """Finds command NAME as the object `NAME` of the module edgeinfer.cli.NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = f"{__name__}.{name}"
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            return None

    def invoke(self, ctx: click.Context) -> object:
        if sys.stdout is None:
            raise click.ClickException("Standard output is closed, so nothing can be shown. Open it.")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except EdgeInferError as error:
            raise click.ClickException(str(error)) from error
        except Terminated as stop:
            ctx.exit(128 + stop.number)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)
        except BrokenPipeError:
            _silence(sys.stdout, sys.stderr)
            ctx.exit(0)
        except OSError as error:
            if error.errno not in _NO_ROOM:  # output is all that a command writes
                raise
            _silence(sys.stdout)
            raise click.ClickException(
                f"The output could not be written: {error.strerror}. Make room, or send it elsewhere."
            ) from error


def _silence(*streams: TextIO) -> None:
    """Python flushes once more when it ends; let that go nowhere, not to where nothing can be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`edgeinfer COMMAND --help` shows the options and examples of a command.",
)
@click.version_option(__version__, prog_name="edgeinfer")
def cli() -> None:
    """Run models that are larger than the memory they may use."""


def main() -> None:
    """Entry point of the `edgeinfer` command."""
    if sys.stderr is None:  # closed by whoever started this: messages go nowhere
        sys.stderr = open(os.devnull, "w")
    # A terminal that cannot show a character gets "?" instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli(prog_name="edgeinfer")
