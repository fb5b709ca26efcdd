"""What a model's outputs mean, as its form says: boxes, regions or classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.forms import ClassesResult, Form
from edgeinfer.inputs.images import Placement
from edgeinfer.outputs.boxes import Box, find_boxes
from edgeinfer.outputs.classes import Scored, looks_like_classes, top_classes
from edgeinfer.outputs.labels import find_labels
from edgeinfer.outputs.regions import find_regions

Finding = Box | Scored


class Reader:
    """Reads the outputs of `model`. `kind`: "boxes", "regions", "classes", or None where nothing is known
    about them.

    `labels`: a file of the user's. A model without a form is a classifier where labels are given or its one
    output is [batch, classes].
    """

    def __init__(self, model: Any, form: Form | None, path: Path, labels: str | None = None):
        self._form = form
        self._classes = (
            form.classes if form else ClassesResult() if labels or looks_like_classes(model.outputs) else None
        )
        own = next((part for part in (form.boxes, self._classes) if part is not None), None) if form else None
        self.kind = None
        if form and form.boxes:
            self.kind = "boxes"
        elif form and form.regions:
            self.kind = "regions"
        elif self._classes is not None:
            self.kind = "classes"
        self.labels = (
            find_labels(
                labels, path, model.metadata, own.labels if own else None, getattr(own, "labels_key", None)
            )
            if self.kind in ("boxes", "classes")
            else None
        )

    def read(
        self,
        outputs: Mapping[str, np.ndarray],
        placement: Placement | None,
        count: int = 5,
        threshold: float | None = None,
    ) -> list[Finding]:
        """Boxes or regions in the picture's pixels, or the `count` most probable classes; none where nothing
        is known."""
        if self.kind == "boxes" and placement is not None:
            return list(find_boxes(outputs, self._form.boxes, placement, self.labels, threshold))
        if self.kind == "regions" and placement is not None:
            return list(
                find_regions(_named(outputs, self._form.regions.output), self._form.regions, placement)
            )
        if self.kind == "classes":
            scores = _named(outputs, self._classes.output or "*")
            return (
                list(top_classes(scores, self.labels, count, self._classes.activation)[0])
                if scores.size
                else []
            )
        return []


def _named(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return outputs[name] if name in outputs else next(iter(outputs.values()))
