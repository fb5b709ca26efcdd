"""A line on standard error for what takes longer than a second."""

from __future__ import annotations

import sys
import threading
import time

_SHOW_AFTER_SECONDS = 1.0
_TERMINAL_SECONDS = 0.25  # between two updates of the line
_LOG_SECONDS = 5.0  # between two lines where standard error is no terminal


class ProgressLine:
    """Shows `label`, the finished share and the time left, from a second after its start until `done`.

    Call it with the finished fraction (0 to 1). A thread of its own draws the line, so that it also moves
    while nothing is reported.
    """

    def __init__(self, label: str):
        self._label = label
        self._fraction = 0.0
        self._start = time.monotonic()
        self._done = threading.Event()
        self._shown = False
        self._terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._draw_until_done, daemon=True)
        self._thread.start()

    def __call__(self, fraction: float) -> None:
        self._fraction = min(1.0, max(0.0, fraction))

    def text(self, seconds: float) -> str:
        """The line after `seconds` of work."""
        if self._fraction <= 0:
            return f"{self._label}: {seconds:.0f} s so far"
        left = seconds / self._fraction * (1 - self._fraction)
        return f"{self._label}: {self._fraction:.0%}, {_duration(left)} left"

    def _draw_until_done(self) -> None:
        pause = _SHOW_AFTER_SECONDS
        try:
            while not self._done.wait(pause):
                line = self.text(time.monotonic() - self._start)
                sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
                sys.stderr.flush()
                self._shown = True
                pause = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        except OSError:
            pass  # nobody reads standard error any more

    def done(self) -> None:
        """Remove the line. May be called more than once."""
        self._done.set()
        self._thread.join()
        if self._shown and self._terminal:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.done()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
