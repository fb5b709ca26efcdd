"""When one model lets the next one run: a probability with hysteresis, held for a while, and begun a little
earlier."""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.forms import GateRule


class Gate:
    """Turns the numbers of one model into stretches of a stream that are open or shut, in samples.

    Open where the number reaches `rule.above`, until it is under `rule.release`, and `hold` samples more; a
    stretch begins `lead` samples early, so that the decision about a sample comes that much later.
    """

    def __init__(self, rule: GateRule, hold: int = 0, lead: int = 0):
        self._rule = rule
        self._hold = hold
        self._lead = lead
        self._asking = False
        self._open_until = 0
        self._position = 0  # decided up to here, but for the lead
        self._undecided: list[tuple[int, bool]] = []  # (samples, open), oldest first
        self.open_samples = self.samples = 0

    @property
    def asking(self) -> bool:
        return self._asking

    def decide(self, count: int, value: float | None) -> None:
        """The next `count` samples have the number `value`; None: they were left out, so they are shut."""
        if value is not None:
            self._asking = value >= self._rule.above or (self._asking and value >= self._rule.release)
            if self._asking:
                self._open_until = self._position + count + self._hold
                self._open_lead()
        held = 0 if value is None else max(0, min(count, self._open_until - self._position))
        for part, is_open in ((held, True), (count - held, False)):
            if part:
                self._undecided.append((part, is_open))
        self._position += count

    def _open_lead(self) -> None:
        """Open the last `lead` samples that are not given out yet."""
        left, kept = self._lead, []
        while left > 0 and self._undecided:
            count, is_open = self._undecided.pop()
            part = min(left, count)
            kept.append((part, True))
            if count > part:
                self._undecided.append((count - part, is_open))
            left -= part
        self._undecided.extend(reversed(kept))

    def take(self, finish: bool = False) -> Sequence[tuple[int, bool]]:
        """(samples, open) of what is decided since the last call; `finish`: all that is left."""
        waiting = sum(count for count, _ in self._undecided)
        ready = waiting if finish else max(0, waiting - self._lead)
        taken: list[tuple[int, bool]] = []
        while ready > 0:
            count, is_open = self._undecided.pop(0)
            part = min(ready, count)
            if count > part:
                self._undecided.insert(0, (count - part, is_open))
            if taken and taken[-1][1] == is_open:
                taken[-1] = (taken[-1][0] + part, is_open)
            else:
                taken.append((part, is_open))
            self.samples += part
            self.open_samples += part if is_open else 0
            ready -= part
        return taken
