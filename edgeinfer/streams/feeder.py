"""Sensing beside computing: a thread takes pieces from a source and puts them into a bounded queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

LATE_RULES = ("wait", "drop-oldest", "drop-newest")


@dataclass(frozen=True)
class Piece:
    """One piece of a stream. `missed`: samples (pieces without a length count 1) that were dropped just
    before it."""

    data: Any
    arrival: float  # time.perf_counter() when it was whole
    missed: int


class Feeder:
    """Iterates over the pieces of `source`, which its own thread takes as they come.

    Where computing is late and `depth` pieces wait, `late` says what happens: "wait" (the source waits),
    "drop-oldest" or "drop-newest". `seconds_of`: the length of a piece; while a source has given more than
    the time that went by, it is not live (a file in a pipe, or what piled up before the start) and waits
    instead. An error of the source is raised where its piece would have been. Use it as a context manager.
    """

    def __init__(
        self,
        source: Iterable[Any],
        late: str = "wait",
        depth: int = 8,
        seconds_of: Callable[[Any], float] | None = None,
    ):
        if late not in LATE_RULES:
            raise ValueError(f"expected late to be one of {', '.join(LATE_RULES)}, got {late!r}")
        if depth < 1:
            raise ValueError(f"expected a depth of at least 1, got {depth}")
        self._source = source
        self._late = late
        self._depth = depth
        self._seconds_of = seconds_of
        self._lasts_until: float | None = None  # when a live source would have given all that came
        self._queue: deque[tuple[Any, float, int]] = deque()
        self._changed = threading.Condition()
        self._done = self._stopped = False
        self._error: BaseException | None = None
        self._missed_last = 0  # dropped behind the newest piece of the queue
        self.taken = self.dropped = 0  # pieces
        self.dropped_samples = 0
        self._thread = threading.Thread(target=self._sense, name="edgeinfer-sense", daemon=True)

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _sense(self) -> None:
        try:
            for data in self._source:
                if not self._put(data):
                    break
        except BaseException as error:
            self._error = error
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _put(self, data: Any) -> bool:
        arrival = time.perf_counter()
        with self._changed:
            self._note_length(data, arrival)
            while len(self._queue) >= self._depth and not self._stopped:
                patience = self._patience()
                if patience is not None and patience <= 0:
                    break
                self._changed.wait(patience)
            if self._stopped:
                return False
            self.taken += 1
            if len(self._queue) >= self._depth:
                self.dropped += 1
                if self._late == "drop-newest":
                    self._missed_last += _length(data)
                    self.dropped_samples += _length(data)
                    return True
                oldest, _, missed = self._queue.popleft()
                missed += _length(oldest)
                self.dropped_samples += _length(oldest)
                if self._queue:
                    following, came, before = self._queue.popleft()
                    self._queue.appendleft((following, came, before + missed))
                else:
                    self._missed_last += missed
            self._queue.append((data, arrival, self._missed_last))
            self._missed_last = 0
            self._changed.notify_all()
        return True

    def _note_length(self, data: Any, arrival: float) -> None:
        if self._seconds_of is not None:
            length = self._seconds_of(data)
            before = arrival - length if self._lasts_until is None else self._lasts_until
            self._lasts_until = before + length

    def _patience(self) -> float | None:
        """Seconds that the source can wait for a place in the queue; None: as long as it takes."""
        if self._late == "wait":
            return None
        return 0.0 if self._lasts_until is None else self._lasts_until - time.perf_counter()

    def __iter__(self) -> Iterator[Piece]:
        while pieces := self._take(1):
            yield pieces[0]

    def batches(self) -> Iterator[list[Piece]]:
        """All pieces that are there, again and again: waking a thread for each one costs time."""
        while pieces := self._take(self._depth):
            yield pieces

    def _take(self, most: int) -> list[Piece]:
        """At least one piece, where there is one; [] at the end. Raises the source's error behind its last
        piece."""
        with self._changed:
            while not self._queue and not self._done:
                self._changed.wait()
            taken = [Piece(*self._queue.popleft()) for _ in range(min(most, len(self._queue)))]
            self._changed.notify_all()
        if not taken and self._error is not None:
            raise self._error
        return taken

    @property
    def missed_at_end(self) -> int:
        """Samples that were dropped behind the last piece."""
        return self._missed_last


def _length(data: Any) -> int:
    return len(data) if isinstance(data, Sized) and getattr(data, "ndim", 0) == 1 else 1
