"""Perplexity against size: the stock types and `auto`, measured, and drawn (SVG)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.budget import format_size
from edgeinfer.errors import ExportError
from edgeinfer.exporters.auto_bits import Choice
from edgeinfer.exporters.importance import Importance
from edgeinfer.exporters.perplexity import Perplexity, perplexity
from edgeinfer.exporters.quantize import quantize_gguf
from edgeinfer.svg import COLOURS, GRID, INK, Frame, line, picture, text

STOCK = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
#: The stock types at whose sizes `auto` is measured.
AUTO_AT = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
PLAIN, WEIGHTED, AUTO = "stock type", "with importance matrix", "auto"

WIDTH, HEIGHT = 900, 480
_PLOT = Frame(80, 84, 620, 350)
_STYLE = {PLAIN: COLOURS[7], WEIGHTED: COLOURS[0], AUTO: COLOURS[1]}
_HIGHEST = 1.25  # of the source's perplexity: what is worse is drawn at the upper edge


@dataclass(frozen=True)
class Point:
    """One quantized file: which kind, what it is called, its bytes, and how well it predicts."""

    series: str
    label: str
    num_bytes: int
    perplexity: Perplexity


def measure_curve(
    source: Path,
    held_out: str,
    importance: Importance | None,
    choose: Callable[[int], Choice] | None,
    folder: Path,
    *,
    requantize: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Point]:
    """Quantize `source` as each of STOCK, with and without importance, and by `choose`; score `held_out`.

    Each file is written into a folder of its own in `folder` and removed again.
    """
    jobs = [(PLAIN, type) for type in STOCK]
    jobs += [(WEIGHTED, type) for type in STOCK] if importance is not None else []
    jobs += [(AUTO, type) for type in AUTO_AT] if choose is not None else []
    points: list[Point] = []
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix=".edgeinfer-", dir=folder) as scratch:
        target = Path(scratch) / "part.gguf"
        for number, (series, type) in enumerate(jobs):
            weights, types, mixture, label = importance if series != PLAIN else None, None, type, type
            if series == AUTO:
                try:
                    choice = choose(sizes[type])
                except ExportError:  # nothing so small
                    continue
                types, mixture, label = choice.types, choice.mixture, format_size(sizes[type])
            report = quantize_gguf(
                source,
                target,
                mixture,
                importance=weights,
                tensor_types=types,
                memory=memory,
                threads=threads,
                requantize=requantize,
            )
            sizes[type] = report.target_bytes
            score = perplexity(target, held_out, memory=memory, threads=threads)
            points.append(Point(series, label, report.target_bytes, score))
            if progress is not None:
                progress((number + 1) / len(jobs))
    return points


def draw_curve(name: str, source_bytes: int, source: Perplexity, points: Sequence[Point]) -> str:
    """The SVG. `name`: of the model; `source`: its perplexity before."""
    most = max(point.num_bytes for point in points)
    least = min(point.num_bytes for point in points)
    pad = 0.08 * (most - least or 1)
    lowest = min(source.value, *(point.perplexity.value for point in points))
    highest = min(max(point.perplexity.value for point in points), source.value * _HIGHEST)
    highest = max(highest, lowest * 1.01)
    margin = 0.06 * (highest - lowest)

    def x(num_bytes: float) -> float:
        return _PLOT.x((num_bytes - least + pad) / (most - least + 2 * pad))

    def y(value: float) -> float:
        return _PLOT.y((min(value, highest) - lowest + margin) / (highest - lowest + 2 * margin))

    parts = [
        text(_PLOT.left, 60, f"Perplexity ({source.tokens:,} tokens) over the size of the file", size=13)
    ]
    parts += _axes(x, y, (least, most), (lowest, highest))
    before = y(source.value)
    parts.append(line(_PLOT.left, before, _PLOT.x(1), before, INK, 'stroke-dasharray="5 3"'))
    parts.append(text(_PLOT.x(1) + 10, before + 4, f"source, {format_size(source_bytes)}"))
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        members = sorted((p for p in points if p.series == series), key=lambda p: p.num_bytes)
        parts += _series(series, members, x, y, highest)
        top = _PLOT.top + 14 + 22 * number
        parts.append(_mark(series, _PLOT.x(1) + 26, top - 4))
        parts.append(text(_PLOT.x(1) + 40, top, series))
    return picture(WIDTH, HEIGHT, name[:80], parts)


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    sizes: tuple[int, int],
    values: tuple[float, float],
) -> list[str]:
    parts = []
    for value in round_steps(*values):
        parts.append(line(_PLOT.left, y(value), _PLOT.x(1), y(value), GRID))
        parts.append(text(_PLOT.left - 8, y(value) + 4, f"{value:.6g}", anchor="end"))
    unit = 1024 ** max(0, (int(sizes[1]).bit_length() - 1) // 10)
    for size in round_steps(sizes[0] / unit, sizes[1] / unit):
        parts.append(line(x(size * unit), _PLOT.top, x(size * unit), _PLOT.y(0), GRID))
        parts.append(text(x(size * unit), _PLOT.y(0) + 20, format_size(round(size * unit)), anchor="middle"))
    return parts


def round_steps(low: float, high: float, about: int = 5) -> list[float]:
    """Values from `low` to `high` that people like to read, about so many."""
    rough = (high - low) / about or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _series(
    series: str,
    points: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    highest: float,
) -> list[str]:
    parts = []
    if series == AUTO:
        where = " ".join(f"{x(p.num_bytes)},{y(p.perplexity.value)}" for p in points)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{_STYLE[series]}" stroke-width="2.5"/>')
    for point in points:
        left, top, value = x(point.num_bytes), y(point.perplexity.value), point.perplexity.value
        parts.append(_mark(series, left, top))
        beyond = f" ({value:.4g})" if value > highest else ""
        if series == PLAIN:
            turned = f'transform="rotate(-55 {left + 6} {top - 7})" fill="#555555"'
            parts.append(text(left + 6, top - 7, point.label + beyond, size=10, more=turned))
    return parts


def _mark(series: str, x: float, y: float) -> str:
    if series == PLAIN:
        return f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8" fill="{_STYLE[series]}"/>'
    return f'<circle cx="{x}" cy="{y}" r="4.5" fill="{_STYLE[series]}"/>'
