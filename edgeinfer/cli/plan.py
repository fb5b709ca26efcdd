"""`edgeinfer plan`: where each part of a model would go under a budget, and how fast that would be."""

from __future__ import annotations

import json
from collections import Counter

import click

from edgeinfer.budget import format_size
from edgeinfer.cli.inspect import role_group
from edgeinfer.errors import EdgeInferError
from edgeinfer.kind import model_kind
from edgeinfer.modelfile import ModelFile
from edgeinfer.plan import Plan
from edgeinfer.system import STREAMING_OFF, streaming_support

GIB = 1 << 30
PLACES = {"resident": "in memory", "streamed": "streamed", "cached": "cached", "rows": "rows only"}


@click.command(
    epilog="""\b
    Examples:
      edgeinfer plan big.gguf --memory 2GiB
      edgeinfer plan big.gguf --memory 50% --json
      edgeinfer plan model.onnx --memory 500MiB
    """
)
@click.argument("model")
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... Default: what is free now.")
@click.option("--ctx", metavar="N", type=click.IntRange(1, 2**31 - 1), help="Tokens of context.")
@click.option("--threads", metavar="N", type=click.IntRange(1, 512), help="Computing threads.")
@click.option("--measure", is_flag=True, help="Measure the disk and the processor again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the place of every weight.")
def plan(
    model: str, memory: str | None, ctx: int | None, threads: int | None, measure: bool, as_json: bool
) -> None:
    """Show where each part of MODEL goes under a memory budget, the predicted speed, and what 1 GiB more would buy."""
    from edgeinfer.engines.opening import plan_model

    if model_kind(model) == "onnx":
        _plan_onnx(model, memory, ctx, threads, measure, as_json)
        return
    try:
        found = plan_model(model, memory=memory, context_length=ctx, threads=threads, again=measure)
    except EdgeInferError as error:
        raise click.ClickException(str(error)) from error
    facts = describe(found.file, found.plan)
    facts["disk_bytes_per_second"] = found.device.disk_bytes_per_second if found.device else None
    facts["predicted_tokens_per_second"] = found.predict()
    facts["predicted_tokens_per_second_with_1_gib_more"] = found.predict(GIB)
    if not streaming_support():
        click.echo(STREAMING_OFF, err=True)
    click.echo(json.dumps(facts) if as_json else table(facts))


def _plan_onnx(
    model: str, memory: str | None, ctx: int | None, threads: int | None, measure: bool, as_json: bool
) -> None:
    from edgeinfer.cli.plan_onnx import describe_onnx_plan, table_onnx_plan

    if ctx is not None:
        raise click.UsageError(f"--ctx is for a GGUF model; {model} is an ONNX model.")
    try:
        facts = describe_onnx_plan(model, memory, threads, measure)
    except EdgeInferError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(facts) if as_json else table_onnx_plan(facts))


def describe(file: ModelFile, plan: Plan) -> dict:
    """Where everything goes, in bytes."""
    places = {tensor.name: _places(plan, tensor.name) for tensor in file.tensors}
    parts: dict[str, Counter] = {}
    for tensor in file.tensors:
        for place in places[tensor.name]:
            parts.setdefault(role_group(tensor), Counter())[place] += tensor.nbytes
    totals = Counter()
    for counts in parts.values():
        totals.update(counts)
    return {
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "weights_bytes": file.weights_bytes,
        "resident_bytes": totals["resident"],
        "streamed_bytes_per_token": totals["streamed"],
        "ring_bytes": plan.ring_bytes,
        "expert_cache_bytes": plan.pools.nbytes if plan.pools else 0,
        "overhead_bytes": plan.overhead_bytes,
        "ledger": dict(plan.ledger.entries),
        "parts": {group: dict(counts) for group, counts in parts.items()},
        "tensors": {name: list(found) for name, found in places.items()},
    }


def _places(plan: Plan, name: str) -> tuple[str, ...]:
    """A tied embedding can be in two places: its rows, and the whole matrix."""
    found = [place for place in ("resident", "streamed", "rows") if name in getattr(plan, place)]
    if plan.pools is not None and name in plan.pools.names:
        found.append("cached")
    return tuple(found) or ("unused",)


def table(facts: dict) -> str:
    """The facts for people."""
    shown = [place for place in PLACES if place != "cached" or facts["expert_cache_bytes"]]
    lines = [
        f"Budget {format_size(facts['budget_bytes'])}, weights {format_size(facts['weights_bytes'])}: "
        + ("everything stays in memory" if facts["mode"] == "in-memory" else "weights are streamed"),
        "",
        f"{'part':<24}" + "".join(f"{PLACES[place]:>12}" for place in shown),
    ]
    for group, sizes in sorted(facts["parts"].items(), key=lambda item: -sum(item[1].values())):
        cells = [format_size(sizes[place]) if sizes.get(place) else "-" for place in shown]
        lines.append(f"{group:<24}" + "".join(f"{cell:>12}" for cell in cells))
    lines += ["", "The process holds", _ledger(facts), ""]
    speed, more = facts["predicted_tokens_per_second"], facts["predicted_tokens_per_second_with_1_gib_more"]
    if facts["expert_cache_bytes"]:
        lines.append(f"Experts are read into a cache of {format_size(facts['expert_cache_bytes'])} as they are wanted.")
    if facts["mode"] == "streaming":
        per_token = format_size(facts["streamed_bytes_per_token"])
        reads = f"Reads {per_token} a token; the" if facts["streamed_bytes_per_token"] else "The"
        lines.append(f"{reads} disk gives {facts['disk_bytes_per_second'] / 1e9:.2f} GB/s.")
    if speed:
        lines.append(f"Predicted: {speed:.2f} tokens/s; with 1 GiB more: {more:.2f} tokens/s.")
    return "\n".join(lines)


def _ledger(facts: dict) -> str:
    from edgeinfer.budget import Ledger

    return Ledger(facts["ledger"]).table()
