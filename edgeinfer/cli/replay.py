"""`edgeinfer replay`: how well each cache policy and predictor does on recorded routing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from edgeinfer.budget import format_size, parse_size
from edgeinfer.errors import EdgeInferError
from edgeinfer.experts.predictors import PREDICTORS, Judgement, judge
from edgeinfer.experts.replay import (
    HitRates,
    Replay,
    bytes_for,
    check_policies,
    curve_sizes,
    expert_use,
    policy_names,
    slots_for,
)
from edgeinfer.experts.replay import replay as replay_trace
from edgeinfer.experts.trace import Trace
from edgeinfer.modelfile import read_model_file

WIDTHS = (10, 12, 14, 14)


@click.command(
    epilog="""\b
    Examples:
      edgeinfer replay routing.npz --memory 1GiB
      edgeinfer replay routing.npz --memory 1GiB --policy lru --policy lrfu --json
      edgeinfer replay routing.npz --memory 1GiB --picture routing.svg
    """
)
@click.argument("file", type=click.Path())
@click.option(
    "--memory", metavar="SIZE", required=True, help="Memory for the cache of experts: 1GiB, 800M ..."
)
@click.option(
    "--policy", "policies", metavar="NAME", multiple=True, help="Replay this policy; again for more."
)
@click.option("--model", metavar="MODEL", help="Check that the trace is of this GGUF file.")
@click.option("--picture", metavar="FILE.svg", help="Draw hit rate over memory, and the use of experts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the use of every expert.")
def replay(
    file: str, memory: str, policies: tuple[str, ...], model: str | None, picture: str | None, as_json: bool
) -> None:
    """Replay the routing in FILE, which `edgeinfer trace` recorded, against cache policies and predictors.

    Belady's is the hit rate of a cache that knows the future: no policy can do better.
    """
    try:
        if picture is not None and Path(picture).suffix.lower() != ".svg":
            raise EdgeInferError(
                f"Pictures are SVG files: expected a name that ends in .svg, found {picture!r}."
            )
        check_policies(policies)
        trace = Trace.read(file)
        if model is not None:
            trace.check_model(read_model_file(model))
        names = tuple(dict.fromkeys(policies)) or policy_names()
        num_slots = slots_for(trace, parse_size(memory))
        found = replay_trace(trace, num_slots, names)
        judged = {name: judge(trace, name) for name in PREDICTORS}
        if picture is not None:
            _draw(trace, found, names, Path(picture))
    except EdgeInferError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(describe(trace, found, judged)) if as_json else table(trace, found, judged))


def _draw(trace: Trace, found: Replay, names: tuple[str, ...], path: Path) -> None:
    from edgeinfer.experts.picture import draw

    sizes = sorted({*curve_sizes(trace), found.num_slots})
    curve = [found if size == found.num_slots else replay_trace(trace, size, names) for size in sizes]
    svg = draw(trace, curve, found.num_slots, expert_use(trace))
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise EdgeInferError(f"The picture {path} cannot be written: {error.strerror or error}.") from error


def describe(trace: Trace, found: Replay, judged: dict[str, Judgement | None]) -> dict:
    """The facts that `--json` prints. Hit rates are shares of the wanted experts."""
    return {
        "model": trace.model,
        "architecture": trace.architecture,
        "fingerprint": trace.fingerprint,
        "num_tokens": trace.num_tokens,
        "num_decoded_tokens": int(trace.decode.sum()),
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "num_experts_used": trace.num_used,
        "num_slots": found.num_slots,
        "cache_bytes": bytes_for(trace, found.num_slots),
        "belady": asdict(found.belady),
        "policies": {
            name: {**asdict(rates), "of_belady": found.ratio(name)} for name, rates in found.policies.items()
        },
        "predictors": {name: asdict(judgement) if judgement else None for name, judgement in judged.items()},
        "expert_use": expert_use(trace).tolist(),
    }


def table(trace: Trace, found: Replay, judged: dict[str, Judgement | None]) -> str:
    """The facts for people."""
    decoded = int(trace.decode.sum())
    cache, whole = (format_size(bytes_for(trace, slots)) for slots in (found.num_slots, trace.num_keys))
    lines = [
        f"{_printable(trace.model)}: {trace.num_layers} layers of {trace.num_experts} experts, "
        f"{trace.num_used} used a token; {trace.num_tokens:,} tokens, {decoded:,} of them decoded",
        f"A cache of {found.num_slots:,} of {trace.num_keys:,} experts, {cache} of {whole}",
        "",
        f"{'policy':<18}{'hit rate':>10}{'of Belady':>12}{'with prompts':>14}{'read a token':>14}",
    ]
    for name, rates in found.policies.items():
        label = f"{name} (default)" if name == policy_names()[0] else name
        lines.append(_policy_row(trace, label, rates, found.ratio(name)))
    lines.append(_policy_row(trace, "Belady", found.belady, 1.0))
    lines += ["", f"{'predictor':<18}{'recall':>10}{'precision':>12}{'recall 2x':>14}{'precision 2x':>14}"]
    for name, judgement in judged.items():
        if judgement is None:
            lines.append(f"{name:<18}" + ("not in this trace" if name == "gate" else "nothing to judge"))
        else:
            shares = (judgement.recall_k, judgement.precision_k, judgement.recall_2k, judgement.precision_2k)
            lines.append(
                f"{name:<18}" + "".join(f"{share:>{w}.1%}" for share, w in zip(shares, WIDTHS, strict=True))
            )
    lines += [
        "",
        "Hit rate: decoded tokens. Recall and precision: of as many guesses as a token uses experts "
        f"({trace.num_used}), and of twice as many.",
    ]
    return "\n".join(lines)


def _policy_row(trace: Trace, label: str, rates: HitRates, ratio: float | None) -> str:
    hit = "-" if rates.decode is None else f"{rates.decode:.1%}"
    share = "-" if ratio is None else f"{ratio:.3f}"
    read = "-"
    if rates.decode is not None:
        wanted = (trace.routed[trace.decode] >= 0).sum(axis=2).mean(axis=0)  # experts a token, by layer
        read = format_size(round((1 - rates.decode) * float((wanted * trace.expert_bytes).sum())))
    return f"{label:<18}{hit:>10}{share:>12}{rates.all:>14.1%}{read:>14}"


def _printable(text: str) -> str:
    """Text from the file may hold terminal commands."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
