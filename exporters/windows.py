"""A text as windows of tokens, and a model that gives the logits of every token of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np

from edgeinfer.budget import default_budget, format_size
from edgeinfer.engines.gguf import GGUFEngine
from edgeinfer.engines.inmemory import plan_without_streaming
from edgeinfer.engines.llama import LlamaContext, LlamaModel
from edgeinfer.engines.opening import Prepared
from edgeinfer.errors import BudgetError, ExportError
from edgeinfer.exporters.nodes import Tap
from edgeinfer.modelfile import ModelFile, read_model_file
from edgeinfer.plan import Plan
from edgeinfer.system import default_threads, streaming_support

if streaming_support():
    from edgeinfer.engines.paging import make_hook

CONTEXT = 512
_LOGITS_BYTES = 64 << 20


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises ExportError that says what is wrong with it."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ExportError(f"The text {path} cannot be read: {error.strerror or error}. Give another file.") from error
    except UnicodeDecodeError as error:
        raise ExportError(
            f"The text {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}. Convert it first."
        ) from None


def windows(model: LlamaModel, text: str, context: int, use: str) -> list[list[int]]:
    """`text` cut into whole windows of `context` tokens, what is left at its end dropped, as llama.cpp's tools do.

    Where the vocabulary wants a BOS, it takes the place of the first token of each window. `use` names what the text
    is for, in the ExportError that is raised where it has not even one window.
    """
    tokens = model.tokenize(text, add_special=True, parse_special=False)
    count = len(tokens) // context
    if count == 0:
        raise ExportError(
            f"The text for {use} is too short: it has {len(tokens)} tokens, expected {context} at least, better 20,000. "
            "Give a longer one."
        )
    found = [tokens[i * context : (i + 1) * context] for i in range(count)]
    if llama_cpp.llama_vocab_get_add_bos(model.vocab):
        bos = llama_cpp.llama_vocab_bos(model.vocab)
        found = [[bos, *window[1:]] for window in found]
    return found


def check_context(file: ModelFile, context: int) -> int:
    """`context`, or what the model was trained for where that is less."""
    if context < 8:
        raise ExportError(f"A window of {context} tokens is too short. Expected 8 at least.")
    return min(context, file.context_length or context)


def tokens_at_once(file: ModelFile, context: int) -> int:
    """How many tokens one pass computes: as many as keep the logits of all of them small."""
    return max(8, min(context, _LOGITS_BYTES // (4 * (file.vocab_size or 1))))


@contextmanager
def scoring_engine(
    path: str | os.PathLike,
    *,
    context: int,
    memory: int | None = None,
    threads: int | None = None,
    tap: Tap | None = None,
    in_memory: bool = False,
    exact: bool = False,
) -> Iterator[GGUFEngine]:
    """An engine whose passes can keep all logits, inside `memory` bytes (None: what is free); `tap` sees its nodes.

    `in_memory`: the model is mapped as stock llama.cpp does it, whatever the memory. Weights are never repacked, so
    that the numbers do not depend on the memory. `exact`: attention is computed in float32 too. Raises what
    `open_engine` raises.
    """
    file = read_model_file(path)
    file.check_can_generate()
    budget, threads = memory or default_budget(), threads or default_threads()
    attention = {"flash_attention": False, "float32_cache": True} if exact else {"flash_attention": None}
    try:
        engine = _open(file, context, budget, threads, tap, in_memory or not streaming_support(), attention)
    except BudgetError as error:
        if error.smallest_bytes is None:
            raise
        raise BudgetError(
            f"{format_size(budget)} of memory are too few to compute with {path}: the smallest that works is "
            f"{format_size(error.smallest_bytes)} ({error.smallest_bytes} bytes). Raise --memory.",
            error.smallest_bytes,
        ) from error
    try:
        if tap is not None:
            tap.active = True
        yield engine
    finally:
        engine.close()


def _open(
    file: ModelFile,
    context: int,
    budget: int,
    threads: int,
    tap: Tap | None,
    in_memory: bool,
    attention: Mapping[str, bool | None],
) -> GGUFEngine:
    ubatch = tokens_at_once(file, context)
    wrap = tap.wrap if tap is not None else dict
    if in_memory:
        return _plain(file, plan_without_streaming(file, budget), context, ubatch, threads, wrap, attention)
    options = {"context_length": context, "threads": threads, "ubatch": ubatch, "outputs_max": ubatch}
    prepared = Prepared(file, **options, **attention, wrap_callbacks=wrap)
    try:
        plan = prepared.plan(budget)
        if plan.mode == "streaming":
            return prepared.start(plan)
    except BaseException:
        prepared.close()
        raise
    prepared.close()
    return _plain(file, plan, context, ubatch, threads, wrap, attention)


def _plain(
    file: ModelFile,
    plan: Plan,
    context_length: int,
    ubatch: int,
    threads: int,
    wrap: Callable[[dict[str, int]], dict[str, int]],
    attention: Mapping[str, bool | None],
) -> GGUFEngine:
    started = time.perf_counter()
    hook = make_hook() if streaming_support() else None
    model = LlamaModel(file.paths[0], load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, use_extra_bufts=False)
    try:
        context = LlamaContext(
            model,
            context_length=context_length,
            ubatch=ubatch,
            threads=threads,
            outputs_max=ubatch,
            **attention,
            **wrap({"abort": hook.abort_address, "abort_data": hook.data_address} if hook else {}),
        )
    except BaseException:
        model.close()
        raise
    return GGUFEngine(plan, model, context, None, hook, started)


def logits_of(
    engine: GGUFEngine,
    window: Sequence[int],
    first: int,
    visit: Callable[[int, np.ndarray], object],
    progress: Callable[[float], None] | None = None,
) -> None:
    """Compute `window` and call `visit(position, logits)` for its positions from `first` on.

    The logits, float32 (vocabulary,), are llama.cpp's memory: the next pass overwrites them.
    """
    engine.truncate(0)
    total = len(window)

    def report(done: int, share: float) -> None:
        if progress is not None:
            progress((done + share * engine.context.ubatch) / total)

    engine.outputs = "last"
    if first:
        engine.prefill(window[:first], lambda done, _all, share: report(done, share))
    engine.outputs = "all"
    seen = 0

    def collect(done: int, _all: int, share: float) -> None:
        nonlocal seen
        for i in range(done - seen):
            visit(first + seen + i, engine.context.logits(i))
        seen = done
        report(first + done, share)

    engine.prefill(window[first:], collect)
