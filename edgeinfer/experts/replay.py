"""Replays a trace against the cache policies: hit rates next to the best possible, for any cache size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeinfer.errors import BudgetError, EdgeInferError
from edgeinfer.experts.accesses import Accesses, accesses
from edgeinfer.experts.belady import belady
from edgeinfer.experts.trace import Trace

try:
    from edgeinfer._native import Policy
except ImportError:  # other systems than Linux
    Policy = None


@dataclass(frozen=True)
class HitRates:
    """Share of the wanted experts that were in the cache; `decode` counts decoded tokens, if any."""

    all: float
    decode: float | None


@dataclass(frozen=True)
class Replay:
    """Hit rates of a cache of `num_slots` experts by policy, and of the best possible cache, Belady's."""

    num_slots: int
    policies: dict[str, HitRates]
    belady: HitRates

    def ratio(self, name: str) -> float | None:
        """Hit rate over Belady's, of decoded tokens or, where there are none, of all; None for 0 over 0."""
        policy, best = self.policies[name], self.belady
        if policy.decode is None or best.decode is None:
            return policy.all / best.all if best.all else None
        return policy.decode / best.decode if best.decode else None


def policy_names() -> tuple[str, ...]:
    """All policies, the default first. EdgeInferError without the C extension."""
    if Policy is None:
        raise EdgeInferError(
            "Cache policies need edgeinfer's C extension, which was not built: it needs Linux and a C "
            "compiler. Install edgeinfer again there."
        )
    return Policy.names()


def check_policies(names: Sequence[str]) -> None:
    """EdgeInferError, naming those that exist, for a policy that does not."""
    known = policy_names()
    for name in names:
        if name not in known:
            raise EdgeInferError(f"There is no cache policy {name!r}. Expected one of {', '.join(known)}.")


def slots_for(trace: Trace, memory_bytes: int) -> int:
    """Experts that fit in `memory_bytes`, all at most; where layers differ in size, by their mean.

    BudgetError where one layer's active experts do not fit.
    """
    total = int(trace.expert_bytes.sum())
    num_slots = memory_bytes * trace.num_layers // total
    if num_slots < trace.num_used:
        smallest = bytes_for(trace, trace.num_used)
        raise BudgetError(
            f"A token uses {trace.num_used} experts in a layer of {trace.model}, but {memory_bytes} bytes "
            f"hold {num_slots}. Expected at least {smallest} bytes (--memory {smallest}).",
            smallest,
        )
    return min(num_slots, trace.num_keys)


def bytes_for(trace: Trace, num_slots: int) -> int:
    """The smallest memory that holds that many experts."""
    return -(-num_slots * int(trace.expert_bytes.sum()) // trace.num_layers)


def replay(trace: Trace, num_slots: int, policies: Sequence[str] | None = None) -> Replay:
    """Hit rates of the named policies (all, where none are named) in a cache of `num_slots` experts."""
    names = policy_names() if policies is None else tuple(policies)
    check_policies(names)
    wanted = accesses(trace, num_slots)
    best = belady(wanted.keys, wanted.group_starts, num_slots)
    rates = {name: _rates(wanted, policy_hits(trace, wanted, num_slots, name)) for name in names}
    return Replay(num_slots, rates, _rates(wanted, best))


def policy_hits(trace: Trace, wanted: Accesses, num_slots: int, name: str, **options: float) -> np.ndarray:
    """Hits (uint8, one a key) of one policy; options as `edgeinfer._native.Policy` takes them."""
    hits = np.zeros(len(wanted.keys), np.uint8)
    layers = np.repeat(np.arange(trace.num_layers, dtype=np.int32), trace.num_experts)
    costs = np.repeat(trace.expert_bytes.astype(np.float32), trace.num_experts)
    policy = Policy(name, trace.num_keys, num_slots, layers=layers, costs=costs, **options)
    policy.replay(wanted.keys, wanted.group_starts, hits)
    return hits


def curve_sizes(trace: Trace, points: int = 12) -> list[int]:
    """Cache sizes from one layer's active experts to all experts, evenly spread."""
    sizes = np.linspace(trace.num_used, trace.num_keys, points).round().astype(int)
    return sorted(set(sizes.tolist()))


def expert_use(trace: Trace) -> np.ndarray:
    """How often each expert was used: int64 (layers, experts)."""
    layers, experts = trace.num_layers, trace.num_experts
    routed = trace.routed.astype(np.int64) + np.arange(layers)[None, :, None] * experts
    return np.bincount(routed[trace.routed >= 0], minlength=layers * experts).reshape(layers, experts)


def _rates(wanted: Accesses, hits: np.ndarray) -> HitRates:
    decoded = hits[wanted.decode]
    return HitRates(float(hits.mean()), float(decoded.mean()) if len(decoded) else None)
