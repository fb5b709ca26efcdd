"""The offline optimum: what is wanted again last gives way (Belady, IBM Systems Journal 5(2), 1966)."""

from __future__ import annotations

import heapq

import numpy as np


def belady(keys: np.ndarray, group_starts: np.ndarray, num_slots: int) -> np.ndarray:
    """Hits (uint8, one a key) of the best possible cache, for accesses as `Policy.replay` takes them.

    The keys of a group are needed together, so none of them gives way to another, and every wanted key must
    be brought in: there is no passing by the cache. ValueError where a group is larger than the cache.
    """
    num = len(keys)
    hits = np.zeros(num, np.uint8)
    wanted, next_use = keys.tolist(), _next_uses(keys).tolist()
    bounds = [*group_starts.tolist(), num]
    cached: dict[int, int] = {}  # key -> its next use
    latest: list[
        tuple[int, int]
    ] = []  # (-next use, key) of cached keys; out of date where `cached` says otherwise
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end - start > num_slots:
            raise ValueError(f"{end - start} keys are wanted at once, but there are {num_slots} slots")
        for i in range(start, end):
            hits[i] = wanted[i] in cached
        missing = end - start - int(hits[start:end].sum())
        # Keys of this group count as wanted again soonest: what they are in `latest` with lies in the past.
        room_needed = len(cached) + missing - num_slots
        while room_needed > 0:
            use, key = heapq.heappop(latest)
            if cached.get(key) == -use and -use >= end:
                del cached[key]
                room_needed -= 1
        for i in range(start, end):
            cached[wanted[i]] = next_use[i]
            heapq.heappush(latest, (-next_use[i], wanted[i]))
    return hits


def _next_uses(keys: np.ndarray) -> np.ndarray:
    """For each access the index of the next one of the same key; beyond the end where there is none."""
    num = len(keys)
    order = np.argsort(keys, kind="stable")
    again = keys[order][1:] == keys[order][:-1]
    next_use = np.full(num, num, np.int64)
    next_use[order[:-1][again]] = order[1:][again]
    return next_use
