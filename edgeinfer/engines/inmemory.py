"""Models that fit the budget: stock llama.cpp, with weights repacked for this processor where that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import llama_cpp

from edgeinfer.budget import Ledger, process_memory
from edgeinfer.engines.llama import LlamaModel
from edgeinfer.engines.repack import working_overrides
from edgeinfer.modelfile import ModelFile
from edgeinfer.plan import Plan


def plan_if_it_fits(file: ModelFile, plan: Plan) -> Plan | None:
    """The stock plan, where all weights fit together with what loading them takes on top; otherwise None."""
    if plan.streamed or plan.pools:
        return None
    entries = dict(plan.ledger.entries, resident_weights=file.weights_bytes, row_buffer=0)
    # A weight is read into an aligned buffer, copied, and repacked from the copy.
    entries["load_peak"] += 2 * max((tensor.nbytes for tensor in file.tensors), default=0)
    ledger = Ledger(entries)
    if ledger.total > plan.budget_bytes:
        return None
    everything = frozenset(tensor.name for tensor in file.tensors)
    return replace(plan, mode="in-memory", resident=everything, rows=frozenset(), ring_bytes=0, ledger=ledger)


def plan_without_streaming(file: ModelFile, budget_bytes: int) -> Plan:
    """The plan of a system that cannot stream: everything in memory, whatever the budget."""
    return Plan(
        mode="in-memory",
        resident=frozenset(tensor.name for tensor in file.tensors),
        streamed=frozenset(),
        rows=frozenset(),
        ring_bytes=0,
        budget_bytes=budget_bytes,
        ledger=Ledger({"interpreter": process_memory().rss_bytes, "resident_weights": file.weights_bytes}),
    )


def load(file: ModelFile, progress: Callable[[float], None] | None = None) -> LlamaModel:
    """Load as stock llama.cpp does, but without a mapping, with which repacked weights would be held twice."""
    return LlamaModel(
        file.paths[0],
        load_mode=llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO,  # faster than buffered reads from a cold cache
        use_extra_bufts=False,
        buffer_types=working_overrides(file),
        progress=progress,
    )
