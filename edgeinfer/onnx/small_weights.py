"""Small weights that a stock session uses in their file, scattered between large ones that it has rearranged.

Where memory is so short that their pages do not stay, the system reads megabytes around each of them in every
pass (measured on a 2 GB encoder with 15 % to spare: 0.87 s a pass instead of 0.12). Told that they are read
here and there, it reads their pages alone, and those stay. Where there is room for the whole file nothing is said:
the session is a stock one.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edgeinfer.budget import available_memory
from edgeinfer.onnx.homes import advise_random, mappings

_SMALL_PAGES = 64


def read_alone(paths: Collection[Path]) -> None:
    """For the small weights in the files `paths` that are mapped now, where memory does not hold these files
    besides. Does nothing where the system does not tell what is mapped.
    """
    try:
        if available_memory() >= sum(path.stat().st_size for path in paths):
            return
        for mapping in [mapping for path in paths for mapping in mappings(path)]:
            if mapping.num_pages <= _SMALL_PAGES:
                advise_random(mapping)
    except (OSError, AttributeError):
        pass
