"""The few shapes that edgeinfer's pictures are made of (SVG)."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
INK, GRID = "#222222", "#dddddd"


@dataclass(frozen=True)
class Frame:
    """A rectangle of the picture, in its units (pixels at normal size), y downwards."""

    left: float
    top: float
    width: float
    height: float

    def x(self, share: float) -> float:
        return round(self.left + share * self.width, 1)

    def y(self, share: float) -> float:
        """Share 0 is the bottom."""
        return round(self.top + (1 - share) * self.height, 1)


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole SVG, on white, with its title."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" '
            f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            text(24, 32, title, size=17),
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    # XML has no control characters, and a model's name may hold any
    words = "".join(char if char.isprintable() else " " for char in words)
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {more}/>'
