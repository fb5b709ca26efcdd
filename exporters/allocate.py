"""A type for each tensor, so that the whole loses least and fits a size: a knapsack, one choice an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 1 << 15


@dataclass(frozen=True)
class Option:
    """One way to keep an item: its bytes, and what it loses (any unit, added up over the items)."""

    name: str
    num_bytes: int
    loss: float


def allocate(items: Mapping[str, Sequence[Option]], room: int) -> dict[str, Option] | None:
    """Item -> option, with the least loss of those that take `room` bytes at most; None where nothing fits.

    Dynamic programming over the bytes beyond the smallest options, in steps of a 32,768th of them: exact but
    for those steps, rounded up; what they leave free is then used by the best single changes.
    """
    choices = {name: _worth_having(options) for name, options in items.items()}
    smallest = sum(options[0].num_bytes for options in choices.values())
    if smallest > room:
        return None
    step = max(1, -(-(room - smallest) // _STEPS))
    size = (room - smallest) // step + 1
    best = np.zeros(size)  # least loss of the items so far, with so many steps at most
    taken: list[np.ndarray] = []
    for options in choices.values():
        new, choice = np.full(size, np.inf), np.zeros(size, np.uint8)
        for number, option in enumerate(options):
            steps = -(-(option.num_bytes - options[0].num_bytes) // step)
            if steps >= size:
                continue
            loss = best[: size - steps] + option.loss
            better = loss < new[steps:]
            new[steps:][better], choice[steps:][better] = loss[better], number
        best = new
        taken.append(choice)
    left, chosen = size - 1, {}
    for (name, options), choice in reversed(list(zip(choices.items(), taken))):
        option = options[choice[left]]
        chosen[name] = option
        left -= -(-(option.num_bytes - options[0].num_bytes) // step)
    return _fill({name: chosen[name] for name in items}, choices, room)


def smallest_bytes(items: Mapping[str, Sequence[Option]]) -> int:
    return sum(min(option.num_bytes for option in options) for options in items.values())


def _worth_having(options: Sequence[Option]) -> list[Option]:
    """Rising in bytes, falling in loss: an option that is larger and not better is never chosen."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _fill(chosen: dict[str, Option], choices: Mapping[str, Sequence[Option]], room: int) -> dict[str, Option]:
    free = room - sum(option.num_bytes for option in chosen.values())
    while True:
        gains = [
            (chosen[name].loss - option.loss, name, option)
            for name, options in choices.items()
            for option in options
            if option.loss < chosen[name].loss and option.num_bytes - chosen[name].num_bytes <= free
        ]
        if not gains:
            return chosen
        _, name, option = max(gains, key=lambda gain: gain[0])
        free -= option.num_bytes - chosen[name].num_bytes
        chosen[name] = option
