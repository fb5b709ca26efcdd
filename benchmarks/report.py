"""The numbers as one Markdown table: what was measured, what was wanted."""

from __future__ import annotations

from benchmarks.measure import median
from benchmarks.report_experts import expert_rows
from benchmarks.report_onnx import onnx_rows

GB = 1e9
STOCK_GOALS = {0.45: 1.9, 0.78: 4.0}
BOUND_GOAL = 0.90
MEMORY_GOAL = 0.98
FAULTS_GOAL = 10

Row = tuple[str, str, str]


def report(results: dict) -> str:
    """`results` as benchmarks.run gathers them -> Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['processors']} processors, {machine['memory_bytes'] / GB:.1f} GB "
        f"of memory, Linux {machine['kernel']}, {results['settings']['threads']} computing threads; "
        f"llama-cpp-python {machine['llama_cpp']}. Load average at the start: {machine['load_average']}.",
        "",
        f"Other processes used up to {results['others_cpu']:.0%} of the processors during a run.",
        "",
        f"{_model(results)}GB are 10^9 bytes, speeds are tokens per second.",
        "",
        "| what | measured | wanted |",
        "| --- | --- | --- |",
    ]
    rows: list[Row] = []
    if "streaming" in results:
        streaming = results["streaming"]
        for part in streaming["limits"]:
            rows += streaming_rows(part, streaming["compute_seconds"])
        rows.append(("stock with its defaults (repacked), smallest limit", streaming["stock_defaults"], ""))
    if "prefill" in results:
        for part in results["prefill"]["budgets"]:
            rows += prefill_rows(part, results["prefill"]["plain"])
    if "in_memory" in results:
        rows += in_memory_rows(results["in_memory"])
    if "experts" in results:
        rows += expert_rows(results["experts"])
    if "onnx" in results:
        rows += onnx_rows(results["onnx"])
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _model(results: dict) -> str:
    """The dense model; nothing where only experts were measured."""
    model = results.get("model")
    return f"Model: {model['name']}, {model['weights_bytes'] / GB:.2f} GB of weights. " if model else ""


def streaming_rows(part: dict, compute: float) -> list[Row]:
    share, rounds = part["limit_share"], part["rounds"]
    ours, stock = (median(rounds, engine, "tokens_per_second") for engine in ("edgeinfer", "stock"))
    runs = [number["edgeinfer"] for number in rounds]
    last = runs[-1]
    label = f"{share:.0%} ({part['limit_bytes'] / GB:.2f} GB)"
    bandwidths = [run[f"bandwidth_{when}"] / GB for run in runs for when in ("before", "after")]
    first, allowed = ([run[f"first_token_{kind}"] for run in runs] for kind in ("seconds", "limit_seconds"))
    in_time = _met(all(took <= limit for took, limit in zip(first, allowed)))
    faults = max(run["major_faults_per_token"] for run in runs)
    kills = sum(run["oom_kills"] for run in runs)
    agree = "the same" if all(number["same_tokens"] for number in rounds) else "DIFFERENT"
    return [
        (f"**{label}**: edgeinfer / stock", f"{ours:.2f} / {stock:.3f}", ""),
        (
            f"{label}: ratio to stock",
            f"{ours / stock:.2f}",
            _at_least(ours / stock, STOCK_GOALS[share]) if share in STOCK_GOALS else "",
        ),
        (
            f"{label}: bound, edgeinfer's share of it",
            f"{median(rounds, 'edgeinfer', 'bound'):.2f}, {median(rounds, 'edgeinfer', 'bound_share'):.3f}",
            _of_bound(median(rounds, "edgeinfer", "bound_share")),
        ),
        (
            f"{label}: the same, all weight bytes counted",
            f"{median(rounds, 'edgeinfer', 'bound_all_weights'):.2f}, "
            f"{median(rounds, 'edgeinfer', 'bound_share_all_weights'):.3f}",
            "",
        ),
        (
            f"{label}: bytes a token: must / did",
            f"{last['bound_streamed_bytes'] / GB:.3f} / {last['streamed_bytes_per_token'] / GB:.3f} GB",
            "",
        ),
        (f"{label}: weights in a pass, fixed overhead", _pass_and_overhead(last), ""),
        (f"{label}: compute a token, waiting for the disk", _compute_and_wait(compute, last), ""),
        (
            f"{label}: disk between the tokens (before, after each run)",
            ", ".join(f"{run['read_alone_bytes_per_second'] / GB:.2f}" for run in runs)
            + " ("
            + ", ".join(f"{rate:.2f}" for rate in bandwidths)
            + ") GB/s",
            "",
        ),
        (
            f"{label}: load to first token (imports: {last['import_seconds']:.1f} s more)",
            _seconds(first),
            f"{_seconds(allowed)}: {in_time}",
        ),
        (
            f"{label}: the system gives fresh memory at",
            ", ".join(f"{run['fresh_memory_seconds_per_gb']:.2f}" for run in runs) + " s/GB",
            "",
        ),
        (
            f"{label}: major page faults a token",
            f"{faults:.1f}",
            f"< {FAULTS_GOAL}: {_met(faults < FAULTS_GOAL)}",
        ),
        (f"{label}: processes killed", str(kills), f"0: {_met(kills == 0)}"),
        (f"{label}: greedy tokens", f"{agree} as stock's", f"the same: {_met(agree == 'the same')}"),
    ]


def _pass_and_overhead(run: dict) -> str:
    return f"{run['pass_weight_bytes'] / GB:.3f} GB, {run['overhead_bytes'] / 1e6:.0f} MB"


def _compute_and_wait(compute: float, run: dict) -> str:
    return f"{compute:.3f} s, {run['disk_wait_fraction']:.0%} of the time"


def prefill_rows(part: dict, plain: dict) -> list[Row]:
    label = f"{part['budget_share']:.0%}"
    count, planned = part["prefill_tokens"], part["planned_streamed_bytes"]
    # Whole disk blocks around each tensor are read, and the ring's edges may fall into the next pass.
    allowed = planned * 1.02 + part["ring_bytes"]
    peak, budget = part["peak_memory_bytes"], part["budget_bytes"]
    return [
        (
            f"{label}: prefill of {count} tokens: edgeinfer / all in memory",
            f"{part['prefill_tokens_per_second']:.2f} / {plain['prefill_tokens_per_second']:.2f}",
            "",
        ),
        (
            f"{label}: read for those {count} tokens, in passes over what is streamed",
            f"{part['prefill_streamed_bytes'] / GB:.3f} GB, "
            f"{part['prefill_streamed_bytes'] / planned if planned else 0:.2f}",
            f"1: {_met(part['prefill_streamed_bytes'] <= allowed)}",
        ),
        (
            f"{label}: peak memory (VmHWM, no cgroup) of the budget",
            f"{peak / GB:.3f} of {budget / GB:.3f} GB",
            f"within: {_met(peak <= budget)}",
        ),
        (
            f"{label}: fixed overhead as planned / peak less weights and ring",
            f"{part['overhead_bytes'] / 1e6:.0f} / {part['measured_overhead_bytes'] / 1e6:.0f} MB",
            "",
        ),
    ]


def in_memory_rows(part: dict) -> list[Row]:
    rounds = part["rounds"]
    ours, stock = (median(rounds, engine, "tokens_per_second") for engine in ("edgeinfer", "stock"))
    mode, last = rounds[-1]["edgeinfer"]["mode"], rounds[-1]["stock"]
    kernels = "repacked" if last["repack"] else f"plain kernels; repacked, {part['repack_refusal']}"
    return [
        (
            f"**no limit** ({mode}): edgeinfer / stock at its best ({kernels})",
            f"{ours:.2f} / {stock:.2f}",
            "",
        ),
        ("no limit: ratio to stock", f"{ours / stock:.3f}", _at_least(ours / stock, MEMORY_GOAL)),
    ]


def _seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.2f} s" for value in values)


def _of_bound(share: float) -> str:
    """Above the bound is no success: its compute or bandwidth was measured too low."""
    return _at_least(share, BOUND_GOAL) if share <= 1.05 else "above the bound: disturbed, measure again"


def _at_least(value: float, goal: float) -> str:
    return f">= {goal:g}: {_met(value >= goal)}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "NO"
