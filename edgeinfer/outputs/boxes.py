"""Boxes from a detector's outputs: decoded as its form says, the overlapping ones dropped, in the picture's
pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms.form import BoxesResult
from edgeinfer.inputs.images import Placement
from edgeinfer.outputs.labels import Labels, label_of

MOST = 3000  # boxes that are compared with each other, the best first


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the picture, the first at the top left."""

    x1: float
    y1: float
    x2: float
    y2: float
    score: float
    number: int
    label: str


def find_boxes(
    outputs: Mapping[str, np.ndarray],
    form: BoxesResult,
    placement: Placement,
    labels: Labels | None,
    threshold: float | None = None,
) -> list[Box]:
    """The boxes of the first picture of a batch, the best first. Raises InputError where outputs are not of
    the form."""
    boxes, scores = decode(outputs, form, placement.size)
    best = scores.argmax(axis=1) if scores.size else np.zeros(0, int)
    top = scores[np.arange(len(best)), best]
    least = form.threshold if threshold is None else threshold
    kept = np.flatnonzero((top >= least) & np.isfinite(boxes).all(axis=1))
    kept = kept[np.argsort(-top[kept], kind="stable")][:MOST]
    kept = kept[drop_overlapping(boxes[kept], best[kept], form.overlap)]
    corners = placement.to_picture(boxes[kept])
    return [
        Box(*map(float, corners[row]), float(top[at]), int(best[at]), label_of(labels, int(best[at])))
        for row, at in enumerate(kept)
    ]


def decode(
    outputs: Mapping[str, np.ndarray], form: BoxesResult, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(corners [N, 4] in pixels of the model's input of `size` (height, width), scores [N, classes])"""
    rows, grid = _rows(_output(outputs, form.boxes), form.layout)
    scored = rows if form.scores is None else _rows(_output(outputs, form.scores), form.layout)[0]
    if rows.shape[1] < form.place + 4 or scored.shape[1] <= form.classes or len(rows) != len(scored):
        raise InputError(
            f"The outputs have {rows.shape[1]} and {scored.shape[1]} numbers a box, which is not what the "
            "form says. "
            "Give another --form."
        )
    return _corners(rows[:, form.place : form.place + 4], form, size, grid), _scores(scored, form)


def _output(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name == "*" and len(outputs) == 1:
        return next(iter(outputs.values()))
    if name not in outputs:
        raise InputError(
            f"The form wants an output {name!r}. The model has {', '.join(outputs)}. Give another --form."
        )
    return outputs[name]


def _rows(array: np.ndarray, layout: str) -> tuple[np.ndarray, tuple[int, int]]:
    """float64 [boxes, numbers] of the first of a batch, and the grid's (height, width)."""
    dims = 3 if layout == "grid" else 2
    if array.ndim not in (dims, dims + 1):
        raise InputError(
            f"The form wants boxes in {dims + 1} dimensions, the output has shape {list(array.shape)}."
        )
    first = array.astype(np.float64) if array.ndim == dims else array[0].astype(np.float64)
    if layout == "rows":
        return first, (0, 0)
    if layout == "columns":
        return first.T, (0, 0)
    return first.reshape(len(first), -1).T, first.shape[1:]


def _corners(
    numbers: np.ndarray, form: BoxesResult, size: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    height, width = size
    unit = np.array([width, height] * 2)
    if form.unit == "cells":
        rows, columns = np.divmod(np.arange(grid[0] * grid[1]), max(1, grid[1]))
        x = (columns + np.tanh(numbers[:, 0])) / grid[1]
        y = (rows + np.tanh(numbers[:, 1])) / grid[0]
        numbers = np.stack([x, y, *_sigmoid(numbers[:, 2:]).T], axis=1)
    if form.form == "centre":
        half = numbers[:, 2:] / 2
        numbers = np.concatenate([numbers[:, :2] - half, numbers[:, :2] + half], axis=1)
    return numbers if form.unit == "pixels" else numbers * unit


def _scores(numbers: np.ndarray, form: BoxesResult) -> np.ndarray:
    if form.activation == "sigmoid":
        numbers = _sigmoid(numbers)
    classes = numbers[:, form.classes :].clip(0) ** form.class_power
    if form.objectness is not None:
        classes = classes * numbers[:, form.objectness, None].clip(0) ** form.objectness_power
    if form.background is not None:
        classes[:, form.background] = 0
    return np.nan_to_num(classes)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))


def drop_overlapping(boxes: np.ndarray, classes: np.ndarray, overlap: float) -> list[int]:
    """Non-maximum suppression: indices of the boxes [N, 4], best first, that cover no better one of their
    class by more than `overlap` (intersection over union)."""
    areas = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    alive, kept = np.ones(len(boxes), bool), []
    for at in range(len(boxes)):
        if not alive[at]:
            continue
        kept.append(at)
        low = np.maximum(boxes[at, :2], boxes[at + 1 :, :2])
        high = np.minimum(boxes[at, 2:], boxes[at + 1 :, 2:])
        common = np.prod(np.clip(high - low, 0, None), axis=1)
        union = areas[at] + areas[at + 1 :] - common
        over = common > overlap * np.where(union > 0, union, 1)
        alive[at + 1 :] &= ~(over & (classes[at + 1 :] == classes[at]))
    return kept
