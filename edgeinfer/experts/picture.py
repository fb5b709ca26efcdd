"""A replay as a picture (SVG): hit rate over memory, and how often each layer used its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeinfer.budget import format_size
from edgeinfer.experts.replay import Replay, bytes_for
from edgeinfer.experts.trace import Trace
from edgeinfer.svg import COLOURS, GRID, INK, Frame, line, picture, text

WIDTH, HEIGHT = 1080, 470
LIGHTEST, DARKEST = (247, 251, 255), (8, 48, 107)
SHADES = 40

CURVES = Frame(70, 84, 400, 300)
USE = Frame(620, 84, 330, 300)


def draw(trace: Trace, curve: Sequence[Replay], num_slots: int, use: np.ndarray) -> str:
    """The SVG. `curve`: replays of rising sizes; `num_slots`: the one to mark; `use`: (layers, experts)."""
    shape = f"{trace.num_layers} layers of {trace.num_experts} experts, {trace.num_used} used a token"
    title = f"{trace.model[:60]}: {shape}"
    return picture(WIDTH, HEIGHT, title, _curves(trace, curve, num_slots) + _expert_use(trace, use))


def _curves(trace: Trace, curve: Sequence[Replay], num_slots: int) -> list[str]:
    frame, total = CURVES, trace.num_keys
    phase = "decoded tokens" if trace.decode.any() else "prompts only"
    parts = [text(frame.left, 60, f"Hit rate over memory for experts ({phase})", size=13)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        memory = format_size(bytes_for(trace, round(share * total))) if share else "0"
        parts += [
            line(frame.left, frame.y(share), frame.x(1), frame.y(share), GRID),
            text(frame.left - 8, frame.y(share) + 4, f"{share:.0%}", anchor="end"),
            text(frame.x(share), frame.y(0) + 18, memory, anchor="middle"),
            text(
                frame.x(share),
                frame.y(0) + 34,
                f"{share:.0%}",
                anchor="middle",
                size=11,
                more='fill="#777777"',
            ),
        ]
    here = frame.x(num_slots / total)
    parts.append(line(here, frame.top, here, frame.y(0), "#999999", 'stroke-dasharray="2 3"'))
    parts.append(
        text(here, frame.top - 5, format_size(bytes_for(trace, num_slots)), anchor="middle", size=11)
    )
    rates = {name: [_rate(point.policies[name]) for point in curve] for name in curve[0].policies}
    rates["Belady"] = [_rate(point.belady) for point in curve]
    lines = []
    for number, (name, values) in enumerate(rates.items()):
        colour = INK if name == "Belady" else COLOURS[number % len(COLOURS)]
        style = 'stroke-width="2" stroke-dasharray="5 3"' if name == "Belady" else 'stroke-width="2.5"'
        where = (f"{frame.x(p.num_slots / total)},{frame.y(v)}" for p, v in zip(curve, values, strict=True))
        lines.append(f'<polyline points="{" ".join(where)}" fill="none" stroke="{colour}" {style}/>')
        y = frame.top + 14 + 20 * number
        parts.append(line(frame.x(1) + 14, y - 4, frame.x(1) + 38, y - 4, colour, style))
        parts.append(text(frame.x(1) + 44, y, name))
    return parts + lines[::-1]  # the first, the default, lies over those that it equals


def _rate(rates) -> float:
    return rates.all if rates.decode is None else rates.decode


def _expert_use(trace: Trace, use: np.ndarray) -> list[str]:
    """A row a layer, the first on top; its experts from the most to the least used."""
    frame = USE
    shares = -np.sort(-use, axis=1) / trace.num_tokens
    largest = shares.max()
    # A root, so that the many experts that are seldom used differ to the eye; see _scale.
    levels = np.ceil(np.sqrt(shares / largest) * (SHADES - 1)).astype(int)
    row, column = frame.height / trace.num_layers, frame.width / trace.num_experts
    parts = [text(frame.left, 60, "Share of the tokens that use an expert, by layer", size=13)]
    for layer, shades in enumerate(levels.tolist()):
        y, start = round(frame.top + layer * row, 2), 0
        for end in range(1, len(shades) + 1):
            if end < len(shades) and shades[end] == shades[start]:
                continue
            x, width = round(frame.left + start * column, 2), round((end - start) * column + 0.3, 2)
            shade = _shade(shades[start] / (SHADES - 1))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{round(row + 0.3, 2)}" fill="{shade}"/>'
            )
            start = end
    for layer in sorted({0, trace.num_layers // 2, trace.num_layers - 1}):
        parts.append(
            text(frame.left - 8, round(frame.top + (layer + 0.5) * row + 4, 1), str(layer), anchor="end")
        )
    middle = frame.top + frame.height / 2
    turned = f'transform="rotate(-90 {frame.left - 38} {middle})"'
    parts.append(text(frame.left - 38, middle, "layer with experts", anchor="middle", more=turned))
    parts.append(text(frame.x(0), frame.y(0) + 18, "most used expert"))
    parts.append(text(frame.x(1), frame.y(0) + 18, "least used", anchor="end"))
    return parts + _scale(Frame(frame.x(1) + 24, frame.top, 14, frame.height), largest)


def _scale(frame: Frame, largest: float) -> list[str]:
    parts = []
    for level in range(SHADES):
        top = frame.y((level + 1) / SHADES)
        height = round(frame.height / SHADES + 0.3, 2)
        shade = _shade(level / (SHADES - 1))
        parts.append(
            f'<rect x="{frame.left}" y="{top}" width="{frame.width}" height="{height}" fill="{shade}"/>'
        )
    for share in (0, 0.5, 1):
        parts.append(text(frame.x(1) + 6, frame.y(share) + 4, f"{share**2 * largest:.0%}"))
    return parts


def _shade(share: float) -> str:
    mixed = (round(a + share * (b - a)) for a, b in zip(LIGHTEST, DARKEST, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
