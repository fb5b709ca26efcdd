"""`edgeinfer layout`: a GGUF file rewritten so that it streams well."""

from __future__ import annotations

import json

import click

from edgeinfer.budget import parse_size
from edgeinfer.cli.progress import ProgressLine
from edgeinfer.cli.termination import termination_interrupts


@click.command(
    epilog="""\b
    Examples:
      edgeinfer layout model.gguf -o model-laid-out.gguf
      edgeinfer layout model-00001-of-00003.gguf -o model.gguf --memory 1GiB
    """
)
@click.argument("model")
@click.option("-o", "--output", metavar="OUT", required=True, help="The file to write.")
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... Default: what is free now.")
@click.option(
    "--no-merge", is_flag=True, help="Keep gate and up of experts apart, as older programs want them."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@termination_interrupts()
def layout(model: str, output: str, memory: str | None, no_merge: bool, force: bool, as_json: bool) -> None:
    """Rewrite the GGUF file MODEL so that it streams well; the parts of a split model become one file.

    Tensors begin at pages (4096 bytes), in the order in which they are used. Gate and up of each expert lie
    side by side, as one tensor, where llama.cpp can read that. No weight is changed, and stock llama.cpp runs
    the result.
    """
    from edgeinfer.exporters.layout import lay_out

    budget = parse_size(memory) if memory else None
    with ProgressLine("Writing") as progress:
        report = lay_out(model, output, memory=budget, merge=not no_merge, force=force, progress=progress)
    click.echo(json.dumps(report.as_dict()) if as_json else "\n".join(report.lines()))
