"""Regions of a map of probabilities: where text is, for example. Boxes are upright."""

from __future__ import annotations

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms.form import RegionsResult
from edgeinfer.inputs.images import Placement
from edgeinfer.outputs.boxes import Box


def find_regions(array: np.ndarray, form: RegionsResult, placement: Placement) -> list[Box]:
    """Boxes around the connected regions of the map [.., H, W], top to bottom (Liao et al., DBNet, 2020)."""
    if array.ndim < 2 or array.size != array.shape[-1] * array.shape[-2]:
        raise InputError(
            f"The form wants one map, the output has shape {list(array.shape)}. Give another --form."
        )
    chances = array.reshape(array.shape[-2:])
    height, width = chances.shape
    scale = np.array([placement.size[1] / width, placement.size[0] / height] * 2)
    found = []
    for pixels in connected(chances > form.threshold):
        ys, xs = np.divmod(pixels, width)
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float64)
        sides = box[2:] - box[:2]
        score = float(chances.ravel()[pixels].mean())
        if sides.min() < form.smallest or score < form.score:
            continue
        grow = sides.prod() * form.grow / (2 * sides.sum())
        corners = placement.to_picture((box + np.array([-grow, -grow, grow, grow]))[None] * scale)[0]
        found.append(Box(*map(float, corners), score, 0, form.label))
    return sorted(found, key=lambda box: (box.y1, box.x1))


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """Flat indices of the pixels of each region of `mask` [H, W]; pixels touch at sides and corners.

    Runs of a row are joined with those they touch in the row above (union-find over runs).
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1))
    for row in range(1, height):
        above, here = first_of_row[row - 1], first_of_row[row]
        while above < first_of_row[row] and here < first_of_row[row + 1]:
            if starts[above] <= ends[here] and starts[here] <= ends[above]:
                parents[root(here)] = root(above)
            if ends[above] < ends[here]:
                above += 1
            else:
                here += 1
    groups: dict[int, list[np.ndarray]] = {}
    for run in range(len(rows)):
        pixels = rows[run] * width + np.arange(starts[run], ends[run])
        groups.setdefault(root(run), []).append(pixels)
    return [np.concatenate(runs) for runs in groups.values()]
