"""`edgeinfer plan` on an ONNX file: whether it fits, how it is cut, what is streamed, and how fast that can
be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeinfer.budget import Ledger, format_size
from edgeinfer.cli.progress import ProgressLine


def describe_onnx_plan(path: str, memory: str | None, threads: int | None, again: bool) -> dict[str, Any]:
    """The facts that `--json` prints. A model that is to run in stages is prepared first, once. Raises
    ModelFileError, BudgetError."""
    from edgeinfer.engines.onnx import open_onnx
    from edgeinfer.onnx.graph import read_onnx
    from edgeinfer.storage import disk_bytes_per_second

    weights = read_onnx(path).weights_bytes
    with ProgressLine("Preparing the model") as progress:
        model = open_onnx(path, memory=memory, threads=threads, progress=progress, say=say)
    with model:
        plan = model.plan
    resident = plan.ledger.entries.get("resident_weights", 0)
    streamed = max(0, weights - resident) if plan.mode == "streaming" else 0
    disk = disk_bytes_per_second(Path(path), again) if streamed else None
    return {
        "mode": plan.mode,
        "reason": plan.reason,
        "provider": plan.provider,
        "provider_reason": plan.provider_reason,
        "budget_bytes": plan.budget_bytes,
        "weights_bytes": weights,
        "num_stages": plan.num_stages,
        "resident_bytes": resident,
        "streamed_bytes_per_pass": streamed,
        "ring_bytes": plan.ring_bytes,
        "ledger": dict(plan.ledger.entries),
        "disk_bytes_per_second": disk,
        "seconds_per_pass_at_least": streamed / disk if disk else None,
    }


def say(sentence: str) -> None:
    click.echo(sentence, err=True)


def table_onnx_plan(facts: dict[str, Any]) -> str:
    """The facts for people."""
    fits = "everything stays in memory" if facts["mode"] == "in-memory" else "weights are streamed"
    lines = [
        f"Budget {format_size(facts['budget_bytes'])}, weights {format_size(facts['weights_bytes'])}: {fits}"
    ]
    if facts["reason"]:
        lines.append(facts["reason"])
    lines.append(f"Computed on {facts['provider']}. {facts['provider_reason']}".rstrip())
    lines += ["", "The process holds", Ledger(facts["ledger"]).table()]
    if facts["mode"] == "streaming":
        count = "1 stage" if facts["num_stages"] == 1 else f"{facts['num_stages']} stages"
        lines += ["", f"{count}. The first input of a size is measured, and streams most."]
        read, disk = format_size(facts["streamed_bytes_per_pass"]), facts["disk_bytes_per_second"]
        if disk:
            least = f"{facts['seconds_per_pass_at_least']:.2f} s a pass or more"
            lines.append(f"Reads up to {read} a pass; the disk gives {disk / 1e9:.2f} GB/s: {least}.")
    return "\n".join(lines)
