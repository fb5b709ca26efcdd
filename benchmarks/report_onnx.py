"""The table rows of ONNX encoders."""

from __future__ import annotations

from benchmarks.onnx import HALF, over_rounds

GB, MB = 1e9, 1e6
BOUND_GOAL = 0.85
MEMORY_GOAL = 0.98

Row = tuple[str, str, str]


def onnx_rows(results: dict) -> list[Row]:
    """`results`: by the name of the model, what benchmarks.onnx.OnnxMeasurements.measure gives."""
    rows = []
    for name, model in results.items():
        rows.append(
            (f"**{name} encoder** ({model['name']}): weights", f"{model['weights_bytes'] / GB:.2f} GB", "")
        )
        for batch, part in model["batches"].items():
            label = f"{name}, batch {batch}"
            rows += _free_rows(label, part)
            for limit in part["limits"]:
                rows += _limit_rows(label, part, limit)
    return rows


def _free_rows(label: str, part: dict) -> list[Row]:
    ours, stock = (
        over_rounds(part["free"], engine, "median_pass_seconds") for engine in ("edgeinfer", "stock")
    )
    return [
        (
            f"{label}, no limit ({part['free'][-1]['edgeinfer']['mode']}): edgeinfer / stock",
            f"{ours:.3f} / {stock:.3f} s, ratio {stock / ours:.3f}",
            _at_least(stock / ours, MEMORY_GOAL),
        )
    ]


def _limit_rows(label: str, part: dict, limit: dict) -> list[Row]:
    rounds = limit["rounds"]
    ours, stock = (over_rounds(rounds, engine, "median_pass_seconds") for engine in ("edgeinfer", "stock"))
    last = rounds[-1]["edgeinfer"]
    label = f"{label}, {limit['limit_share']:.0%}"
    peak = max(run["edgeinfer"]["peak_memory_bytes"] for run in rounds)
    rate = over_rounds(rounds, "edgeinfer", "read_alone_bytes_per_second")
    share = over_rounds(rounds, "edgeinfer", "bound_share")
    first = over_rounds(rounds, "edgeinfer", "first_output_seconds")
    digests = {run[engine]["digest"] for run in rounds for engine in ("edgeinfer", "stock") if engine in run}
    digests |= {run["stock"]["digest"] for run in part["free"]}
    if stock is None:
        against = f"{ours:.3f} s / {rounds[-1]['stock_ended']}"
        wanted = ""
    else:
        against, wanted = (
            f"{ours:.3f} / {stock:.3f} s, ratio {stock / ours:.2f}",
            _at_least(stock / ours, MEMORY_GOAL),
        )
    rows = [
        (
            f"**{label}** ({limit['limit_bytes'] / GB:.2f} GB, {last['mode']}): edgeinfer / stock",
            against,
            wanted,
        ),
        (
            f"{label}: share of the bound 1 / max(compute, must be read / disk)",
            f"{share:.3f} ({part['compute_seconds']:.3f} s; {last['bound_streamed_bytes'] / GB:.3f} GB"
            + (f" at {rate / GB:.2f} GB/s)" if rate else ")"),
            _at_least(share, BOUND_GOAL) if limit["limit_share"] == HALF else "",
        ),
        (
            f"{label}: read a pass, weights of a pass, fixed overhead with activations",
            f"{last['streamed_bytes'] / GB:.3f}, {last['pass_weight_bytes'] / GB:.3f} GB, "
            f"{last['overhead_bytes'] / MB:.0f} MB",
            "",
        ),
        (
            f"{label}: peak memory of the budget",
            f"{peak / GB:.3f} of {last['budget_bytes'] / GB:.3f} GB",
            f"within: {_met(peak <= last['budget_bytes'])}",
        ),
        (f"{label}: to the first output, opening included", f"{first:.1f} s", ""),
        (
            f"{label}: outputs",
            "stock's" if len(digests) == 1 else "DIFFERENT",
            f"stock's: {_met(len(digests) == 1)}",
        ),
    ]
    return rows


def _at_least(value: float, goal: float) -> str:
    return f">= {goal:g}: {_met(value >= goal)}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "NO"
