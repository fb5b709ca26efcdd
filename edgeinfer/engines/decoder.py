"""The engine of ONNX decoders with a KV cache: the same interface as edgeinfer.engines.gguf.GGUFEngine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from onnxruntime import OrtValue

from edgeinfer.budget import Ledger, budget_of, format_size
from edgeinfer.engines.kv_cache import GrowingCache, SharedCache, cache_bytes
from edgeinfer.engines.onnx import OnnxModel, OnnxStatistics, open_onnx
from edgeinfer.engines.sampling import LogitsSampler
from edgeinfer.engines.text_vocabulary import TextVocabulary
from edgeinfer.errors import BudgetError, EngineError, ModelFileError
from edgeinfer.onnx.graph import OnnxFile, read_onnx
from edgeinfer.onnx.plan import OnnxPlan
from edgeinfer.onnx.ports import Port, stored_ports
from edgeinfer.streams.state import find_state

DEFAULT_CONTEXT = 4096
_LOGITS_BYTES = 32 << 20  # of one batch of a prompt
_LEAST_BATCH = 32  # tokens of a prompt that are computed together, at least
_BATCH_SHARE = 8  # of the budget, for what a batch computes with
_KNOWN = ("input_ids", "attention_mask", "position_ids")
_LAST_ONLY = (
    "num_logits_to_keep"  # an input with a default, of files that edgeinfer and onnxruntime-genai export
)


@dataclass(frozen=True)
class DecoderStatistics(OnnxStatistics):
    """Counters since the model was opened. `experts`: always None; a GGUF engine may have them."""

    experts: None = None


def can_write(inputs: Sequence[tuple[str, str, tuple]]) -> bool:
    """Whether inputs (name, type, shape) are those of a decoder that continues a text: ids, and a cache of
    keys and values."""
    names = [name for name, _, _ in inputs]
    return "input_ids" in names and any(name.startswith("past") for name in names)


def is_decoder_file(path: str | os.PathLike) -> bool:
    """Whether the ONNX file at `path` is a decoder with its tokenizer beside it, so that it can write."""
    return (Path(path).parent / "tokenizer.json").is_file() and can_write(read_onnx(path).inputs)


@dataclass(frozen=True)
class DecoderPorts:
    """What a decoder takes and gives. `pairs`: {past: present}; `others`: its inputs besides `caches`."""

    caches: tuple[Port, ...]
    pairs: Mapping[str, str]
    others: tuple[Port, ...]
    logits: Port

    @classmethod
    def read(cls, file: OnnxFile) -> DecoderPorts:
        """ModelFileError for what is no decoder."""
        inputs, outputs = stored_ports(file.inputs), stored_ports(file.outputs)
        pairs = find_state(inputs, outputs, {})
        caches = tuple(port for port in inputs if port.name in pairs)
        others = tuple(port for port in inputs if port.name not in pairs)
        unknown = [port for port in others if port.name not in _KNOWN]
        if unknown or not pairs:
            found = (
                ", ".join(f"{port.name} ({port.describe()})" for port in unknown)
                or "no cache that comes out again"
            )
            raise ModelFileError(
                f"{file.path} is not a decoder that can be run: expected {', '.join(_KNOWN)} and pairs of "
                f"past and present, found {found}."
            )
        logits = next((port for port in outputs if port.name == "logits"), outputs[0])
        return cls(caches, pairs, others, logits)

    @property
    def vocabulary_size(self) -> int | None:
        size = self.logits.shape[-1]
        return size if isinstance(size, int) else None


class DecoderEngine:
    """A decoder, its one sequence of tokens, and its KV cache. `logits`: [vocabulary], of the last token.

    `model` has a budget that leaves `cache_bytes` for the cache; `in_place`: its attention writes into it.
    """

    def __init__(
        self,
        model: OnnxModel,
        ports: DecoderPorts,
        vocabulary: TextVocabulary,
        context_length: int,
        in_place: bool,
        started: float,
    ):
        self._model = model
        self._ports = ports
        self.model = vocabulary
        self.context_length = context_length
        self._cache_bytes = cache_bytes(ports.caches, context_length)
        self._cache = (
            SharedCache(ports.caches, ports.pairs, context_length)
            if in_place
            else GrowingCache(ports.caches, ports.pairs)
        )
        self.in_place = in_place
        self._last_only = _LAST_ONLY in model.defaults
        self._one = OrtValue.ortvalue_from_numpy(np.array(1))
        row = 4 * (ports.vocabulary_size or 32768)
        self.ubatch = 512 if self._last_only else max(1, min(512, _LOGITS_BYTES // row))
        self.position = 0
        self.logits = np.zeros(0, np.float32)
        self._make_room()
        self._load_seconds = time.perf_counter() - started

    def _make_room(self) -> None:
        """Learn what batches of a prompt take at the end of the context, where they take most, so that none
        is a surprise. The larger they are, the seldomer weights are read for a prompt, and the fewer stay.
        """
        if self.mode != "streaming":
            return
        most = min(self.ubatch, self.context_length)
        self.ubatch = min(_LEAST_BATCH, most)
        taken = self._make_room_for(self.ubatch)
        while self.ubatch < most and 2 * taken <= self._model.plan.budget_bytes // _BATCH_SHARE:
            try:
                taken = self._make_room_for(min(2 * self.ubatch, most))
            except BudgetError:
                break
            self.ubatch = min(2 * self.ubatch, most)
        self._cache.clear()

    def _make_room_for(self, count: int) -> int:
        start = self.context_length - count
        self._cache.clear(start)
        passes = [self._inputs([0] * length, start) for length in (count, 1)]
        return self._model.make_room(passes, self._outputs())

    @property
    def plan(self) -> OnnxPlan:
        """How the model is run; its budget and ledger are those of model and cache."""
        plan = self._model.plan
        ledger = Ledger({**plan.ledger.entries, "kv_cache": self._cache_bytes})
        return replace(plan, budget_bytes=plan.budget_bytes + self._cache_bytes, ledger=ledger)

    @property
    def mode(self) -> str:
        return self.plan.mode

    @property
    def context(self) -> DecoderEngine:
        """Where edgeinfer.generate looks for `ubatch`, the tokens of one pass."""
        return self

    def make_sampler(self, temperature: float, top_p: float, seed: int | None) -> LogitsSampler:
        return LogitsSampler(temperature, top_p, seed)

    def prefill(
        self, tokens: Sequence[int], progress: Callable[[int, int, float], None] | None = None
    ) -> None:
        """Append `tokens`; the last one's logits are kept. After an error the sequence is as before."""
        start = self.position
        try:
            for done in range(0, len(tokens), self.ubatch):
                if progress:
                    progress(done, len(tokens), 0.0)
                self._pass(tokens[done : done + self.ubatch])
        except BaseException:
            if self.position > start:
                self.truncate(start)
            raise
        if progress:
            progress(len(tokens), len(tokens), 0.0)

    def decode(self, tokens: Sequence[int]) -> None:
        """Append `tokens`; see `prefill`."""
        self.prefill(tokens)

    def _pass(self, tokens: Sequence[int]) -> None:
        end = self.position + len(tokens)
        if end > self.context_length:
            raise EngineError(f"The context of {self.context_length:,} tokens is full.")
        results = self._model.run_values(self._inputs(tokens, self.position), self._outputs())
        self.logits = results[self._ports.logits.name].numpy()[0, -1].copy()  # not a view of what is bound
        self._cache.take(results)
        self.position = end

    def _inputs(self, tokens: Sequence[int], position: int) -> dict[str, OrtValue]:
        """What the model reads for `tokens` from `position` on: the cache where it lies."""
        end = position + len(tokens)
        feeds = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, end)),
            "position_ids": np.arange(position, end)[None],
        }
        values = {
            port.name: OrtValue.ortvalue_from_numpy(feeds[port.name].astype(port.dtype))
            for port in self._ports.others
        }
        last = {_LAST_ONLY: self._one} if self._last_only else {}
        return {**values, **last, **self._cache.inputs()}

    def _outputs(self) -> dict[str, OrtValue | None]:
        return {self._ports.logits.name: None, **self._cache.outputs()}

    def sample(self, sampler: LogitsSampler) -> int:
        """The token that follows the sequence."""
        return sampler.sample(self)

    def truncate(self, length: int) -> int:
        """Forget the tokens from position `length` on; gives the new length."""
        if length < self.position:
            self._cache.truncate(length)
            self.position = length
        return self.position

    def statistics(self) -> DecoderStatistics:
        counters = self._model.statistics()
        values = {field.name: getattr(counters, field.name) for field in fields(counters)}
        values["budget_bytes"] += self._cache_bytes
        return DecoderStatistics(**{**values, "load_seconds": self._load_seconds})

    def close(self) -> None:
        self._model.close()


def open_decoder(
    path: str | os.PathLike,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> DecoderEngine:
    """Open an ONNX decoder (Optimum's names: input_ids, attention_mask, position_ids,
    past_key_values.N.key/value, logits, present.N.key/value) with its tokenizer.json. Raises ModelFileError,
    BudgetError, InputError, EngineError.
    """
    started = time.perf_counter()
    file = read_onnx(path)
    ports = DecoderPorts.read(file)
    vocabulary = TextVocabulary(Path(path), ports.vocabulary_size, file.metadata)
    context = context_length or min(vocabulary.train_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    cache = cache_bytes(ports.caches, context)
    budget = budget_of(memory)
    try:
        model = open_onnx(path, memory=max(0, budget - cache), threads=threads, progress=progress)
    except BudgetError as error:
        if error.smallest_bytes is None and cache < budget:  # it is not the cache that is too large
            raise
        raise _too_small(budget, context, cache, error.smallest_bytes) from error
    try:
        if model.plan.ledger.total > model.plan.budget_bytes:  # where nothing can be streamed
            raise _too_small(budget, context, cache, model.plan.ledger.total)
        in_place = any(name == "GroupQueryAttention" for _, name in file.operators)
        return DecoderEngine(model, ports, vocabulary, context, in_place, started)
    except BaseException:
        model.close()
        raise


def _too_small(budget: int, context: int, cache: int, needed: int | None) -> BudgetError:
    """`needed`: bytes of the model, at least."""
    rest = f", and the model {format_size(needed)} at least" if needed else ""
    return BudgetError(
        f"The KV cache of {context:,} tokens takes {format_size(cache)}{rest}: more than the budget of "
        f"{format_size(budget)}. Give a smaller --ctx, or raise --memory.",
        smallest_bytes=cache + needed if needed else None,
    )
