"""A picture with boxes drawn on it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from edgeinfer.outputs.boxes import Box

_TURN = 0.618034  # of the colour circle between two classes: neighbours differ most


def draw_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of `picture` with the boxes, the best on top, each with its label and score."""
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    size = max(11, round(max(picture.size) / 55))
    font = ImageFont.load_default(size)
    for box in reversed(boxes):
        colour = _colour(box.number)
        pen.rectangle((box.x1, box.y1, box.x2, box.y2), outline=colour, width=max(2, size // 6))
        text = f"{box.label} {box.score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        y = box.y1 - (bottom - top) - 4 if box.y1 > bottom - top + 4 else box.y1
        pen.rectangle((box.x1, y, box.x1 + right - left + 6, y + bottom - top + 4), fill=colour)
        pen.text((box.x1 + 3 - left, y + 2 - top), text, fill="black", font=font)
    return drawn


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _TURN % 1, 0.65, 1)
    return round(255 * red), round(255 * green), round(255 * blue)
