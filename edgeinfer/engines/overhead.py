"""What a model holds besides its weights: measured while it is loaded, so that the rest of the budget is for weights."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence

from edgeinfer.budget import available_memory, format_size, process_memory
from edgeinfer.engines.llama import LlamaContext
from edgeinfer.engines.llama_log import recent_log
from edgeinfer.errors import BudgetError
from edgeinfer.modelfile import GGUFArray, ModelFile
from edgeinfer.plan import WeightUse

_MIB = 1 << 20
_PAGE = mmap.PAGESIZE
#: Allocator fragments, thread stacks and Python objects that come and go while running.
_SLACK = 6 * _MIB
_FLOATS = ("F16", "BF16", "F32")
#: What Python itself holds differs from run to run.
_RUN_TO_RUN = 3 * _MIB
_CONTEXT_STEP = 256
_LARGEST_TRIAL_BYTES = 1 << 30
_COMPUTE_BUFFER = re.compile(r"compute buffer size\s*=\s*([0-9.]+) MiB")


class Overhead:
    """Ledger entries, filled in while the model is being loaded. Construct before, then call the methods in order."""

    def __init__(self, file: ModelFile, ubatch: int):
        self._file = file
        self._ubatch = ubatch
        self._entries: dict[str, int] = {"interpreter": process_memory().rss_bytes}
        self._last = self._entries["interpreter"]

    def _grown(self) -> int:
        now = process_memory().rss_bytes
        grown, self._last = max(0, now - self._last), max(now, self._last)
        return grown

    def model_loaded(self) -> None:
        self._entries["metadata"] = self._grown()

    def context_made(self, context: LlamaContext, outputs_max: int) -> None:
        """llama.cpp clears a new KV cache, so all of it is touched now; its other buffers are touched in use."""
        touched = self._grown()
        expected = kv_bytes_per_token(self._file) * context.context_length
        self._entries["kv_cache"] = max(touched, expected)
        self._entries["compute_buffers"] = _compute_buffer_bytes()
        self._entries["logits"] = 2 * outputs_max * (self._file.vocab_size or 0) * 4

    def entries(self, uses: Sequence[WeightUse]) -> dict[str, int]:
        """All entries that are not weights nor ring."""
        entries = dict(self._entries)
        tensors = [self._file.tensor(use.name) for use in uses]
        # ggml's work buffer: a product's activations in the format of its kernel, 8 bits a value for quantized weights.
        widest = max((tensor.shape[0] * (2 if tensor.type in _FLOATS else 1.25) for tensor in tensors), default=0)
        entries["compute_buffers"] += int(widest * self._ubatch)
        rows = [self._file.tensor(use.name) for use in uses if use.rows]
        entries["row_buffer"] = sum(
            self._ubatch * (tensor.nbytes // max(1, tensor.shape[1]) + 2 * _PAGE) for tensor in rows
        )
        weights = sum({tensor.name: tensor.nbytes for tensor in tensors}.values())
        entries["load_peak"] = _SLACK + weights // 512  # page tables: 8 bytes a page
        return entries


def _compute_buffer_bytes() -> int:
    """Of the context that was made last, from llama.cpp's log; a guess on the safe side where it does not say."""
    sizes = [float(match[1]) for line in recent_log() if (match := _COMPUTE_BUFFER.search(line))]
    return int(sizes[-1] * _MIB) if sizes else 256 * _MIB


def kv_bytes_per_token(file: ModelFile) -> int:
    """Bytes of keys and values (float16) that one token takes in all layers, as the metadata tells."""

    def number(key: str, default: int = 0) -> list[int]:
        value = file.metadata.get(f"{file.architecture}.{key}", default)
        if isinstance(value, GGUFArray):
            values = [item for item in value.values or () if type(item) is int]
            return values or [default]
        return [value if type(value) is int else default]

    heads = max(1, max(number("attention.head_count", 1)))
    head_dim = (file.embedding_length or 0) // heads
    key_dim = max(number("attention.key_length", head_dim))
    value_dim = max(number("attention.value_length", head_dim))
    kv_heads = number("attention.head_count_kv", heads)
    if len(kv_heads) == 1:
        kv_heads = kv_heads * file.num_layers
    latent = max(number("attention.kv_lora_rank"))
    if latent:  # multi-head latent attention keeps one compressed key a layer
        return file.num_layers * (latent + max(number("rope.dimension_count", 64))) * 2
    return sum(kv_heads) * (key_dim + value_dim) * 2


def check_kv_cache_fits(
    file: ModelFile, context_length: int, budget_bytes: int, smallest_budget: Callable[[int], int]
) -> None:
    """Raise BudgetError, naming a --ctx that works, before llama.cpp would take a KV cache beyond the budget.

    `smallest_budget` gives the bytes of the smallest budget that works with a context of so many tokens.
    """
    per_token = kv_bytes_per_token(file)
    needed, room = per_token * context_length, budget_bytes - process_memory().rss_bytes
    if needed <= room or needed == 0:
        return
    if room <= 0 and needed <= available_memory() // 2:
        return  # no context fits: the planner will name the smallest budget
    fits, smallest = _largest_context(budget_bytes - _RUN_TO_RUN, per_token, smallest_budget)
    advice = (
        f"Use a smaller context (--ctx {fits} fits), or raise --memory."
        if fits
        else f"Raise --memory: the smallest that works is {format_size(smallest)} ({smallest} bytes), with "
        f"--ctx {_CONTEXT_STEP}."
    )
    raise BudgetError(
        f"The KV cache of {context_length} tokens takes {format_size(needed)}, more than the budget of "
        f"{format_size(budget_bytes)} leaves. {advice}",
        smallest_bytes=None if fits else smallest,
    )


def _largest_context(
    budget_bytes: int, kv_per_token: float, smallest_budget: Callable[[int], int]
) -> tuple[int, int]:
    """(tokens, bytes of the smallest budget for them) of about the largest context that works; 0 tokens: none.

    Compute buffers grow with the context too, so a small one shows what a token really takes, and what is guessed
    from that is tried. Every trial holds its KV cache: one of more than a GiB is named untried, with more to spare.
    """
    fits, smallest, per_token = _CONTEXT_STEP, smallest_budget(_CONTEXT_STEP), kv_per_token
    if smallest > budget_bytes:
        return 0, smallest
    for share in (0.25, 0.97, 0.95, 0.9, 0.8):
        tokens = fits + int(share * (budget_bytes - smallest) / per_token) // _CONTEXT_STEP * _CONTEXT_STEP
        if tokens * kv_per_token > _LARGEST_TRIAL_BYTES:
            if share > 0.25:
                return fits + int((tokens - fits) * 0.95) // _CONTEXT_STEP * _CONTEXT_STEP, smallest
            tokens = int(_LARGEST_TRIAL_BYTES / kv_per_token) // _CONTEXT_STEP * _CONTEXT_STEP
        if tokens <= fits:
            break
        tried = smallest_budget(tokens)
        per_token = max(kv_per_token, (tried - smallest) / (tokens - fits))
        if tried <= budget_bytes:
            fits, smallest = tokens, tried
            if share > 0.25:
                break
    return fits, smallest
