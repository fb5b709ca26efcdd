"""What `edgeinfer quantize` says to people when it is done."""

from __future__ import annotations

from typing import Any

from edgeinfer.budget import format_size


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    kinds: dict[str, int] = {}
    for kind in facts["tensors"].values():
        kinds[kind] = kinds.get(kind, 0) + 1
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
    lines = [
        _size_line(facts["source"], facts["source_bytes"], facts["source_bits_per_weight"]),
        _size_line(facts["target"], facts["target_bytes"], facts["bits_per_weight"]),
        f"Tensors: {counts}",
    ]
    if "importance" in facts:
        lines.append(_importance_line(facts["importance"]))
    if "predicted_divergence" in facts:
        lines.append(_choice_line(facts))
    if "perplexity" in facts:
        lines += _perplexity_lines(facts["perplexity"])
    return "\n".join(lines)


def _size_line(path: str, num_bytes: int, bits: float) -> str:
    return f"{path}: {format_size(num_bytes)}, {bits:.2f} bits a weight"


def _importance_line(importance: dict[str, Any]) -> str:
    line = f"Importance from {importance['origin']}: {importance['tokens']:,} tokens"
    line += f", {importance['tensors']} tensors"
    if importance["unused_experts"]:
        line += f", {importance['unused_experts']} experts never used (a longer text may reach them)"
    return line


def _choice_line(facts: dict[str, Any]) -> str:
    line = f"Predicted divergence: {facts['predicted_divergence']:.4f} nats a token"
    line += "; loss on the calibration text: "
    line += _difference(facts["calibration_loss_difference"], facts["calibration_loss_difference_error"])
    return line + (f". The stock type {facts['stock_type']} was best" if facts["stock_type"] else "")


def _perplexity_lines(scores: dict[str, dict[str, float]]) -> list[str]:
    names = {name: name.replace("_", " ") for name in scores}
    values = [f"{s['value']:.4f} ± {s['error']:.4f} {names[name]}" for name, s in scores.items()]
    losses = [
        f"{_difference(s['loss_difference'], s['loss_difference_error'])} {names[name]}"
        for name, s in scores.items()
        if "loss_difference" in s
    ]
    return [
        f"Perplexity on {scores['before']['tokens']:,} tokens: {', '.join(values)}",
        f"Loss on the same tokens, nats a token: {', '.join(losses)}",
    ]


def _difference(mean: float, error: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}"
