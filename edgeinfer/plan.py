"""Which weights stay, which are streamed: a plan for one model under one budget.

A dense model uses its weights in the same order for every token, so a cache that replaces by age never hits: the plan
keeps a fixed part and streams the rest, spread evenly over the pass (balanced locking, FlexInfer), through a ring that
is read ahead. Time per token is bounded below by max(compute, streamed bytes / disk bandwidth).
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgeinfer.budget import Ledger, format_size
from edgeinfer.errors import BudgetError

MIB = 1 << 20
DEFAULT_POLICY = "lrfu"  # by replaying recorded routing: see docs/benchmarks.md
SMALL_BYTES = 256 << 10  # norms, biases, gates: streaming them would cost more waits than it saves bytes
READ_AHEAD_BYTES = 28 * MIB  # measured: less lets the disk stand still when it is about as fast as the computing


MOST_MATRICES = 3  # of an expert, that the cache can keep together; EXPERT_MATRICES in native/experts.h
EXPERT_CHUNK_BYTES = MIB // 2  # smaller pieces: what is needed waits less behind guesses that are being read
READ_BUFFERS_BYTES = 9 * MIB  # one piece for each reading thread, where experts lie across blocks of the disk


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight in a pass, in order. `through_view`: its address is baked into the graph when it is built."""

    name: str
    nbytes: int
    rows: bool = False  # only some rows are looked up, by token id
    through_view: bool = False
    experts: int = 0  # multiplied by those of so many experts that a router chose; 0: as a whole
    layer: int | None = None
    choice: int = 0  # of experts: weights with the same number multiply by the same ones
    router: bool = False  # chooses the experts of its layer


@dataclass(frozen=True)
class ExpertPools:
    """Where experts live: layers whose experts are alike share the slots of a pool.

    A layer is what follows one choice of experts; a layer of the model that routes twice is two. `num_experts`: of the
    layer that has most. `layers`: the names of a layer's expert weights, in order of use; `kinds`: the pool of each layer; `slots`: how many
    experts each pool holds; `slot_bytes`: bytes of a slot of each pool. `num_used`: experts that a token uses.
    """

    num_experts: int
    num_used: int
    layers: tuple[tuple[str, ...], ...]
    kinds: tuple[int, ...]
    slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    policy: str = DEFAULT_POLICY
    predict: bool = True

    @property
    def nbytes(self) -> int:
        return sum(slots * size for slots, size in zip(self.slots, self.slot_bytes))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for layer in self.layers for name in layer)


@dataclass(frozen=True)
class Device:
    """What the machine does, measured: bytes of weights computed per second, by ggml type, and bytes read per second."""

    disk_bytes_per_second: float
    compute_bytes_per_second: Mapping[str, float] = field(default_factory=dict)
    default_compute_bytes_per_second: float = 5e9

    def compute_seconds(self, weight_type: str, nbytes: int) -> float:
        return nbytes / self.compute_bytes_per_second.get(weight_type, self.default_compute_bytes_per_second)


@dataclass(frozen=True)
class Plan:
    """Where each weight lives. Names in none of the three sets are streamed.

    `resident`: read once, kept. `rows`: tables of which the rows of each pass are read. `streamed`: read for every
    use, through a ring of `ring_bytes`; `pools`: the cache of experts, None without one. `ledger`: what everything holds, in bytes that are touched.
    """

    mode: str  # "streaming" or "in-memory"
    resident: frozenset[str]
    streamed: frozenset[str]
    rows: frozenset[str]
    ring_bytes: int
    pools: ExpertPools | None = None
    experts_used: int = 0  # by a token, in each layer that has experts
    budget_bytes: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    chunk_bytes: int = MIB
    reading_threads: int = 8  # measured: 8 reads of 1 MiB in flight keep their rate while every processor computes
    direct: bool = True

    @property
    def overhead_bytes(self) -> int:
        """What the budget pays for that is not weights nor room to stream them: the fixed overhead."""
        entries = self.ledger.entries
        return self.ledger.total - sum(entries.get(name, 0) for name in ("resident_weights", "ring", "expert_cache"))


def _span(nbytes: int) -> int:
    """Bytes that a streamed block takes in the ring: whole pages around it, at worst."""
    return nbytes + 2 * mmap.PAGESIZE


def smallest_ring(sizes: Sequence[int]) -> int:
    """The ring that can hold the largest streamed weight and the next one, wherever they fall in it."""
    largest = max(sizes, default=0)
    return 2 * _span(largest) if largest else 0


def ring_for(sizes: Sequence[int]) -> int:
    """The ring that keeps the disk busy: one weight in use, and room to read ahead of it."""
    largest = max(sizes, default=0)
    return max(2 * _span(largest), _span(largest) + READ_AHEAD_BYTES) if largest else 0


def spread(uses: Sequence[WeightUse], streamable: set[str], wanted_bytes: int) -> set[str]:
    """Names out of `streamable` of at least `wanted_bytes`, spread evenly over the bytes of the pass.

    Error diffusion: going through the pass, a weight is streamed when the streamed bytes so far lag behind their
    share of all bytes so far. What is then too much is taken back, largest first.
    """
    total = sum(use.nbytes for use in uses)
    sizes = {use.name: use.nbytes for use in uses}
    chosen: set[str] = set()
    done = streamed = 0
    for use in uses:
        done += use.nbytes
        lag = wanted_bytes * done / total - streamed
        if use.name in streamable and use.name not in chosen and lag >= use.nbytes / 2:
            chosen.add(use.name)
            streamed += use.nbytes
    rest = [use.name for use in uses if use.name in streamable and use.name not in chosen]
    rest.sort(key=lambda name: sizes[name])
    while streamed < wanted_bytes and rest:
        missing = wanted_bytes - streamed
        name = next((n for n in rest if sizes[n] >= missing), rest[-1])
        rest.remove(name)
        chosen.add(name)
        streamed += sizes[name]
    for name in sorted(chosen, key=lambda name: -sizes[name]):
        if streamed - sizes[name] >= wanted_bytes:
            chosen.remove(name)
            streamed -= sizes[name]
    return chosen


def make_plan(
    uses: Sequence[WeightUse],
    budget_bytes: int,
    overhead: Mapping[str, int],
    can_be_rows: frozenset[str] = frozenset(),
    experts_used: int = 0,
    ubatch: int = 512,
    pooled: bool = False,
) -> Plan:
    """The plan that streams least under `budget_bytes`; `overhead`: ledger entries of all that is not weights.

    `experts_used` by a token, and `ubatch` tokens in a pass, size the cache of experts, which `pooled` asks for even
    where all would fit. Raises BudgetError, with the smallest budget that works, when even streaming everything that
    can be does not fit.
    """
    sizes = {use.name: use.nbytes for use in uses}
    rows = frozenset(
        use.name for use in uses if use.rows and use.name in can_be_rows and use.nbytes > SMALL_BYTES
    )
    products = [use for use in uses if not use.rows or use.name not in rows]
    capacity = budget_bytes - sum(overhead.values())
    pools = None
    if pooled or sum(sizes[name] for name in {use.name for use in products}) > capacity:
        pools = plan_pools(products, capacity, experts_used, ubatch)
    if pools is not None:
        products = [use for use in products if use.name not in pools.names]
        capacity -= pools.nbytes + _pool_overhead(pools, ubatch)
    pinned = {use.name for use in products if _stays(use)} - rows
    names = {use.name for use in products}
    total = sum(sizes[name] for name in names)

    if total <= capacity:
        best = (names, set(), 0)
    else:
        best = _choose_streamed(products, names - pinned, sizes, total, capacity)
    if best is None:
        smallest = sum(overhead.values()) + _smallest_weights(names, pinned, sizes)
        if pools is not None:
            smallest += pools.nbytes + _pool_overhead(pools, ubatch)
            if not pooled:  # experts so few and small that all of them take less than a cache does
                smallest = min(smallest, sum(overhead.values()) + total + sum(sizes[name] for name in pools.names))
        raise BudgetError(
            f"The budget of {format_size(budget_bytes)} is too small for this model: the smallest that works is "
            f"{format_size(smallest + MIB)} ({smallest + MIB} bytes). Raise --memory, or give a smaller --ctx: the "
            f"KV cache takes {format_size(overhead.get('kv_cache', 0))} of it.",
            smallest_bytes=smallest + MIB,
        )
    resident, streamed, ring = best
    entries = dict(overhead, resident_weights=sum(sizes[name] for name in resident), ring=ring)
    if pools is not None:
        entries["expert_cache"] = pools.nbytes
        entries["compute_buffers"] = entries.get("compute_buffers", 0) + _pool_overhead(pools, ubatch)
    return Plan(
        mode="streaming",
        resident=frozenset(resident),
        streamed=frozenset(streamed),
        rows=rows,
        ring_bytes=ring,
        pools=pools,
        experts_used=experts_used,
        budget_bytes=budget_bytes,
        ledger=Ledger(entries),
        chunk_bytes=MIB if pools is None else EXPERT_CHUNK_BYTES,
    )


def _stays(use: WeightUse) -> bool:
    return use.through_view or use.nbytes <= SMALL_BYTES or use.rows or use.router


def plan_pools(
    products: Sequence[WeightUse], capacity: int, experts_used: int, ubatch: int
) -> ExpertPools | None:
    """A cache of experts out of what is left beside the other weights; None for a model without experts.

    Even where nothing is left it holds the experts that one token uses in a layer: other weights are streamed then.
    """
    layers = _layers_of_experts(products)
    if not layers:
        return None
    shapes = [tuple(use.nbytes // use.experts for use in uses) for uses in layers]
    kinds = list(dict.fromkeys(shapes))
    slot_bytes = [sum(expert_stride(size) for size in kind) for kind in kinds]
    experts = [sum(uses[0].experts for uses, shape in zip(layers, shapes) if shape == kind) for kind in kinds]
    per_slot = 8 * max(1, experts_used) * ubatch  # ggml's work buffer for one more expert
    pooled = {use.name for uses in layers for use in uses}
    others = sum({use.name: use.nbytes for use in products if use.name not in pooled}.values())
    slots = [max(1, min(experts_used, number)) for number in experts]
    room = capacity - others - READ_BUFFERS_BYTES
    room -= sum(number * (size + per_slot) for number, size in zip(slots, slot_bytes))
    if room > 0:
        weights = [number * size for number, size in zip(experts, slot_bytes)]
        shares = [room * weight // sum(weights) for weight in weights]
        more = [share // (size + per_slot) for share, size in zip(shares, slot_bytes)]
        slots = [min(least + extra, number) for least, extra, number in zip(slots, more, experts)]
    return ExpertPools(
        num_experts=max(uses[0].experts for uses in layers),
        num_used=experts_used,
        layers=tuple(tuple(use.name for use in uses) for uses in layers),
        kinds=tuple(kinds.index(shape) for shape in shapes),
        slots=tuple(slots),
        slot_bytes=tuple(slot_bytes),
    )


def _layers_of_experts(products: Sequence[WeightUse]) -> list[list[WeightUse]]:
    """The weights that share each choice of experts, in order of use, where the cache can hold them."""
    layers: dict[tuple[int | None, int], list[WeightUse]] = {}
    for use in products:
        if use.experts and use not in layers.setdefault((use.layer, use.choice), []):
            layers[use.layer, use.choice].append(use)
    counts = Counter(use.name for uses in layers.values() for use in uses)
    for use in products:  # an address that is baked into the graph, or a use of all experts at once
        if use.through_view or not use.experts:
            counts[use.name] += 1
    return [
        uses
        for uses in layers.values()
        if len(uses) <= MOST_MATRICES and all(counts[use.name] == 1 and use.experts == uses[0].experts for use in uses)
    ]


def expert_stride(nbytes: int) -> int:
    """Bytes from slot to slot for an expert's matrix of `nbytes`: whole pages, so that aligned files are read in place."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _pool_overhead(pools: ExpertPools, ubatch: int) -> int:
    """What a cache of experts takes besides its slots: ggml's work buffer grows with them, and reads need a buffer."""
    return 8 * max(1, pools.num_used) * ubatch * max(pools.slots) + READ_BUFFERS_BYTES


def _choose_streamed(
    uses: Sequence[WeightUse], streamable: set[str], sizes: Mapping[str, int], total: int, capacity: int
) -> tuple[set[str], set[str], int] | None:
    """(resident, streamed, ring bytes) that streams the fewest bytes. None where nothing fits.

    Streaming only weights up to some size keeps the ring small and the rest resident; every size is tried, first
    with a ring that keeps the disk busy, then with the smallest that works.
    """
    best = None
    for ring_rule in (ring_for, smallest_ring):
        for limit in sorted({sizes[name] for name in streamable}):
            below = {name for name in streamable if sizes[name] <= limit}
            ring = ring_rule([limit])
            wanted = total + ring - capacity
            if wanted > sum(sizes[name] for name in below):
                continue
            chosen = spread(uses, below, max(wanted, 1))
            streamed_bytes = sum(sizes[name] for name in chosen)
            if best is None or streamed_bytes < best[0]:
                best = (streamed_bytes, chosen, ring)
        if best is not None:
            break
    if best is None:
        return None
    _, chosen, ring = best
    return {use.name for use in uses} - chosen, chosen, ring


def _smallest_weights(names: set[str], pinned: set[str], sizes: Mapping[str, int]) -> int:
    """Bytes of weights and ring that the smallest budget must hold."""
    base = sum(sizes[name] for name in names & pinned)
    free = sorted((sizes[name] for name in names - pinned), reverse=True)
    best = base + sum(free)
    kept = 0
    for largest in free:  # the ones before it are kept, it and the rest are streamed
        best = min(best, base + kept + smallest_ring([largest]))
        kept += largest
    return best


def predict(plan: Plan, uses: Sequence[WeightUse], device: Device, types: Mapping[str, str]) -> float:
    """Tokens per second of decoding under `plan`: 1 / max(computing, reading), as the device does them alone.

    Experts are taken to be used evenly: a cache that holds a half of them is missed by a half.
    """
    pools = plan.pools
    compute = streamed = 0.0
    for use in uses:
        if use.rows:
            continue
        share = plan.experts_used / use.experts if use.experts and plan.experts_used else 1.0
        compute += device.compute_seconds(types.get(use.name, ""), use.nbytes) * share
        if use.name in plan.streamed:
            streamed += use.nbytes
        elif pools is not None and use.name in pools.names:
            held = sum(pools.slots) / (len(pools.layers) * pools.num_experts)
            streamed += use.nbytes * share * max(0.0, 1 - held)
    return 1 / max(compute, streamed / device.disk_bytes_per_second)
