"""The table rows of mixture-of-experts models."""

from __future__ import annotations

from benchmarks.experts import BOUND_GOALS, PREDICTABLE_RECALL, over_rounds

GB, MB = 1e9, 1e6
STOCK_GOAL = 22
NEARLY_ALL_GOAL = 0.90
MANY_SLOTS = 3000
MOST_SHARE = 1.10  # a policy may miss less than LRU, which the bound counts, but not by much

Row = tuple[str, str, str]


def expert_rows(results: dict) -> list[Row]:
    """`results`: by the name of the model, what benchmarks.experts.measure_experts gives."""
    return [row for name, model in results.items() for row in _model_rows(name, model)]


def _model_rows(name: str, model: dict) -> list[Row]:
    label = f"{name} {model['limit_share']:.0%}"
    rounds, lru = model["rounds"], model["lru"]
    last = rounds[-1]["on"]
    cache = last["expert_cache"]
    predictable = (over_rounds(model, "on", "recall") or 0) >= PREDICTABLE_RECALL
    weights, limit = model["weights_bytes"] / GB, model["limit_bytes"] / GB
    speeds = [over_rounds(model, variant, "tokens_per_second") for variant in ("on", "off")]
    rows = [
        (f"**{name} experts** ({model['name']}): weights, limit", f"{weights:.2f}, {limit:.2f} GB", ""),
        *_stock_rows(label, model, speeds[0]),
        _bound_row(label, model, "on", predictable),
        _bound_row(label, model, "off", False),
        (
            f"{label}: prediction on / off",
            f"{speeds[0]:.2f} / {speeds[1]:.2f}, ratio {speeds[0] / speeds[1]:.2f}",
            "",
        ),
        (
            f"{label}: recall, precision of prediction; of what was read ahead, used",
            ", ".join(_percent(last[key]) for key in ("recall", "precision", "reads_ahead_used")),
            "",
        ),
        (
            f"{label}: hit rate: {cache['policy']} and predicted / lru alone",
            f"{last['hit_rate']:.1%} (+ {last['on_the_way']:.1%} on the way) / {lru['hit_rate']:.1%}",
            "",
        ),
        (
            f"{label}: bytes a token: prediction on / off / lru",
            " / ".join(f"{_bytes(run):.0f}" for run in (last, rounds[-1]["off"], lru)) + " MB",
            "",
        ),
        _slots_row(label, cache, name == "small"),
        (
            f"{label}: computing a token, waiting for the disk",
            f"{model['compute_seconds']:.3f} s, {last['disk_wait_fraction']:.0%} of the time",
            "",
        ),
        (
            f"{label}: disk between the tokens",
            ", ".join(f"{number['on']['read_alone_bytes_per_second'] / GB:.2f}" for number in rounds) + " GB/s",
            "",
        ),
        _tokens_row(label, rounds),
        _memory_row(f"{label}: memory (VmHWM), decoding", last, model["limit_bytes"]),
    ]
    if "nearly_all" in model:
        rows.append(_nearly_all_row(name, model))
    if "prefill" in model:
        run = model["prefill"]
        rows.append((f"{label}: prefill of {run['prefill_tokens']} tokens", *_prefill_cells(run)))
        rows.append(_memory_row(f"{label}: memory (VmHWM), that prefill", run, run["budget_bytes"]))
    return rows


def _stock_rows(label: str, model: dict, ours: float) -> list[Row]:
    if "stock" not in model["rounds"][0]:
        return [(f"{label}: edgeinfer", f"{ours:.2f}", "")]
    stock = over_rounds(model, "stock", "tokens_per_second")
    return [
        (f"{label}: edgeinfer / stock", f"{ours:.2f} / {stock:.3f}", ""),
        (f"{label}: ratio to stock", f"{ours / stock:.1f}", _at_least(ours / stock, STOCK_GOAL)),
    ]


def _bound_row(label: str, model: dict, variant: str, predictable: bool) -> Row:
    bound, share = (over_rounds(model, variant, key) for key in ("bound", "bound_share"))
    wanted = _at_least(share, BOUND_GOALS[predictable])
    if share > MOST_SHARE:
        wanted = "above the bound: disturbed, measure again"
    return f"{label}: bound, share of it, prediction {variant}", f"{bound:.2f}, {share:.3f}", wanted


def _slots_row(label: str, cache: dict, many: bool) -> Row:
    wanted = _at_least(cache["slots"], MANY_SLOTS) if many else ""
    return f"{label}: slots of the cache, experts", f"{cache['slots']:,}, {cache['experts']:,}", wanted


def _nearly_all_row(name: str, model: dict) -> Row:
    part = model["nearly_all"]
    ours, plain = over_rounds(part, "on", "tokens_per_second"), 1 / model["compute_seconds"]
    return (
        f"{name} {part['limit_share']:.0%}: edgeinfer / all in memory, the same kernels",
        f"{ours:.2f} / {plain:.2f} ({ours / plain:.3f})",
        _at_least(ours / plain, NEARLY_ALL_GOAL),
    )


def _tokens_row(label: str, rounds: list[dict]) -> Row:
    agree = all(number["same_tokens"] for number in rounds)
    cells = "the same with all, and as all in memory" if agree else "DIFFERENT"
    return f"{label}: greedy tokens", cells, f"the same: {_met(agree)}"


def _prefill_cells(run: dict) -> tuple[str, str]:
    read = f"{run['prefill_streamed_bytes'] / GB:.2f} GB read"
    return f"{run['prefill_tokens_per_second']:.1f} tokens/s, {read}", ""


def _memory_row(label: str, run: dict, limit: int) -> Row:
    peak = run["peak_memory_bytes"]
    good = _met(peak <= limit and run["oom_kills"] == 0)
    return label, f"{peak / GB:.3f} of {limit / GB:.3f} GB, {run['oom_kills']} killed", f"within: {good}"


def _bytes(run: dict) -> float:
    return run["streamed_bytes_per_token"] / MB


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"


def _at_least(value: float, goal: float) -> str:
    return f">= {goal:g}: {_met(value >= goal)}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "NO"
