"""Which weights of a staged model stay and which are streamed, under one budget.

A stage computes with all of its weights in memory, while those of the next one are read: the ring for
streamed weights holds what three stages that follow each other stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from edgeinfer.budget import Ledger, format_size
from edgeinfer.errors import BudgetError
from edgeinfer.onnx.stage_files import Table
from edgeinfer.plan import SMALL_BYTES, WeightUse, spread

MIB = 1 << 20
CHUNK_BYTES = MIB
READING_THREADS = 8
AHEAD = 2  # stages that are read while one computes
_MOST_FOR_RING = 1.1  # times the streamed bytes, for a ring one stage larger


@dataclass(frozen=True)
class Block:
    """Whole pages of a stage's data file, which hold one weight or several neighbours; `table`: rows of it
    are enough.
    """

    name: str
    stage: int
    offset: int
    nbytes: int
    table: Table | None = None


@dataclass(frozen=True)
class OnnxPlan:
    """How a model is run. `mode`: "in-memory" (one stock session, nothing streamed) or "streaming" (in
    stages).

    `resident`, `streamed`, `rows`: names of blocks; of the last only rows are read; `ring_bytes`: of the ring
    for streamed ones; `reason`: why it is so, for people; `provider`: what computes, and `provider_reason`
    why.
    """

    mode: str
    budget_bytes: int
    ledger: Ledger
    num_stages: int = 1
    resident: frozenset[str] = frozenset()
    streamed: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    ring_bytes: int = 0
    streamed_bytes: int = 0  # a pass
    reason: str = ""
    provider: str = "cpu"
    provider_reason: str = ""

    @property
    def overhead_bytes(self) -> int:
        """What the budget pays for that is not weights nor room to stream them: the fixed overhead."""
        entries = self.ledger.entries
        return self.ledger.total - entries.get("resident_weights", 0) - entries.get("ring", 0)


Placement = tuple[set[str], int]  # (names of streamed blocks, bytes of the ring)


def place_blocks(blocks: Sequence[Block], capacity: int) -> Placement | None:
    """What to stream, the fewest bytes, so that the rest and the ring fit `capacity` bytes. None: nothing
    fits.
    """
    total = sum(block.nbytes for block in blocks)
    if total <= capacity:
        return set(), 0
    best: Placement | None = None
    for ring_rule in (smallest_ring, partial(ring_for, ahead=1), ring_for):
        tried = [_stream_up_to(limit, blocks, total, capacity, ring_rule) for limit in _limits(blocks)]
        found = [placement for placement in tried if placement is not None]
        placement = min(found, key=lambda placement: _bytes_of(placement[0], blocks), default=None)
        if placement and (best is None or _is_worth_it(placement, best, blocks)):
            best = placement
    return best


def _is_worth_it(larger: Placement, smaller: Placement, blocks: Sequence[Block]) -> bool:
    """Whether a larger ring gains more by keeping the disk busy than it costs: more is streamed, as less stays."""
    return _bytes_of(larger[0], blocks) <= _MOST_FOR_RING * _bytes_of(smaller[0], blocks)


def place_least(blocks: Sequence[Block]) -> Placement:
    """What takes the least memory: all is streamed but what would make the ring larger than it is itself."""
    placements: list[Placement] = [(set(), 0)]
    for limit in _limits(blocks):
        streamed = {block.name for block in blocks if SMALL_BYTES < block.nbytes <= limit}
        placements.append((streamed, smallest_ring(blocks, streamed)))
    return min(placements, key=lambda placement: held_bytes(blocks, placement))


def held_bytes(blocks: Sequence[Block], placement: Placement) -> int:
    """Bytes of memory that weights and ring take."""
    streamed, ring = placement
    return sum(block.nbytes for block in blocks if block.name not in streamed) + ring


def _limits(blocks: Sequence[Block]) -> list[int]:
    """Sizes up to which blocks may be streamed: leaving out the largest ones keeps the ring small."""
    return sorted({block.nbytes for block in blocks if block.nbytes > SMALL_BYTES})


def _stream_up_to(
    limit: int, blocks: Sequence[Block], total: int, capacity: int, ring_rule: Callable[..., int]
) -> Placement | None:
    """The placement that streams blocks up to `limit` bytes. The ring depends on what is streamed, and
    that on it.
    """
    can = {block.name for block in blocks if SMALL_BYTES < block.nbytes <= limit}
    most = _bytes_of(can, blocks)
    uses = [WeightUse(block.name, block.nbytes) for block in blocks]
    ring = 0
    while total + ring - capacity <= most:
        streamed = spread(uses, can, max(1, total + ring - capacity))
        needed = ring_rule(blocks, streamed)
        if needed <= ring:
            return streamed, needed
        ring = needed
    return None


def _bytes_of(names: Collection[str], blocks: Sequence[Block]) -> int:
    return sum(block.nbytes for block in blocks if block.name in names)


def _streamed_by_stage(blocks: Sequence[Block], streamed: Collection[str]) -> list[int]:
    """Bytes that each stage streams, of those that stream any."""
    sizes: dict[int, int] = {}
    for block in blocks:
        if block.name in streamed:
            sizes[block.stage] = sizes.get(block.stage, 0) + block.nbytes
    return [sizes[stage] for stage in sorted(sizes)]


def ring_for(blocks: Sequence[Block], streamed: Collection[str], ahead: int = AHEAD) -> int:
    """The ring that keeps the disk busy: the streamed weights of a stage and of `ahead` behind it in the cycle.

    With one behind it, nothing else is read while the last piece of the next stage is waited for.
    """
    sizes = _streamed_by_stage(blocks, streamed)
    cycle = sizes + sizes[:ahead]
    windows = [sum(cycle[first : first + 1 + ahead]) for first in range(len(sizes))]
    return max([smallest_ring(blocks, streamed), *windows])


def smallest_ring(blocks: Sequence[Block], streamed: Collection[str]) -> int:
    """The ring that holds one stage's: a block lies in one piece, so the end of the ring may stay empty."""
    largest = max((block.nbytes for block in blocks if block.name in streamed), default=0)
    return max(_streamed_by_stage(blocks, streamed), default=0) + largest


def make_plan(
    blocks: Sequence[Block],
    num_stages: int,
    budget_bytes: int,
    overhead: Mapping[str, int],
    measuring: bool,
    reason: str = "",
) -> OnnxPlan:
    """The plan that streams least; `measuring`: what it computes with is not known yet, so it keeps as
    little as it can.

    `overhead`: ledger entries of all that is not weights nor ring. Raises BudgetError, with the smallest
    budget that works, where nothing fits.
    """
    held = sum(overhead.values())
    capacity = budget_bytes - held
    rows = {block.name for block in blocks if block.table is not None}
    if sum(block.nbytes for block in blocks) <= capacity and not measuring:
        rows = set()
    products = [block for block in blocks if block.name not in rows]
    least = place_least(products)
    smallest = held + held_bytes(products, least)
    if smallest > budget_bytes:
        raise BudgetError(
            f"The budget of {format_size(budget_bytes)} is too small for this model: the smallest that works "
            "is "
            f"{format_size(smallest + MIB)} ({smallest + MIB} bytes). Raise --memory.",
            smallest_bytes=smallest + MIB,
        )
    streamed, ring = least if measuring else place_blocks(products, capacity) or least
    resident = {block.name for block in products} - streamed
    entries = dict(overhead, resident_weights=_bytes_of(resident, blocks), ring=ring)
    return OnnxPlan(
        mode="streaming",
        budget_bytes=budget_bytes,
        ledger=Ledger(entries),
        num_stages=num_stages,
        resident=frozenset(resident),
        streamed=frozenset(streamed),
        rows=frozenset(rows),
        ring_bytes=ring,
        streamed_bytes=_bytes_of(streamed, blocks),
        reason=reason,
    )
