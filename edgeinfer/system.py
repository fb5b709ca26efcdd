"""What this system offers: whether weights can be streamed here, and how many threads should compute."""

from __future__ import annotations

import os
import sys

STREAMING_OFF = "Streaming is off on this system: the model is held in memory, whatever --memory says."


def streaming_support() -> bool:
    """Whether weights can be streamed: Linux, with the C extension."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import edgeinfer._native  # noqa: F401
    except ImportError:
        return False
    return True


def usable_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Computing threads: the processors that this process may use, one a physical core where that is known."""
    import psutil

    allowed = usable_processors()
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical))
