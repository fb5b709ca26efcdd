"""The engine of ONNX decoders with a KV cache: the same interface as edgeinfer.engines.gguf.GGUFEngine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from onnxruntime import OrtValue

from edgeinfer.budget import format_size
from edgeinfer.engines.kv_cache import GrowingCache, SharedCache, cache_bytes
from edgeinfer.engines.onnx import OnnxModel, OnnxStatistics, open_onnx
from edgeinfer.engines.sampling import LogitsSampler
from edgeinfer.engines.text_vocabulary import TextVocabulary
from edgeinfer.errors import BudgetError, EngineError, ModelFileError
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.ports import Port
from edgeinfer.streams.state import find_state

DEFAULT_CONTEXT = 4096
_LOGITS_BYTES = 32 << 20  # of one batch of a prompt
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


class DecoderEngine:
    """A decoder, its one sequence of tokens, and its KV cache. `logits`: [vocabulary], of the last token."""

    def __init__(
        self, path: Path, model: OnnxModel, in_place: bool, context_length: int | None, started: float
    ):
        self._model = model
        self._session = model.session
        if self._session is None:
            raise EngineError(
                f"{path} does not fit the budget in one piece, and its KV cache can only be bound in one "
                "session. "
                "Raise --memory."
            )
        self.plan = model.plan
        self._pairs = find_state(model.inputs, model.outputs, {})
        self._inputs = [port for port in model.inputs if port.name not in self._pairs]
        self._check_inputs(path)
        self._logits = next((port for port in model.outputs if port.name == "logits"), model.outputs[0])
        size = self._logits.shape[-1]
        self.model = TextVocabulary(path, size if isinstance(size, int) else None, model.metadata)
        trained = self.model.train_context or DEFAULT_CONTEXT
        self.context_length = context_length or min(trained, DEFAULT_CONTEXT)
        caches = [port for port in model.inputs if port.name in self._pairs]
        self._check_budget(caches)
        self._cache = (
            SharedCache(caches, self._pairs, self.context_length)
            if in_place
            else GrowingCache(caches, self._pairs)
        )
        self.in_place = in_place
        self._last_only = _LAST_ONLY in [each.name for each in self._session.get_overridable_initializers()]
        self._one = OrtValue.ortvalue_from_numpy(np.array(1))
        row = 4 * (size if isinstance(size, int) else 32768)
        self.ubatch = 512 if self._last_only else max(1, min(512, _LOGITS_BYTES // row))
        self.position = 0
        self.logits = np.zeros(0, np.float32)
        self._load_seconds = time.perf_counter() - started

    def _check_inputs(self, path: Path) -> None:
        unknown = [port for port in self._inputs if port.name not in _KNOWN]
        if unknown or not self._pairs:
            found = (
                ", ".join(f"{port.name} ({port.describe()})" for port in unknown)
                or "no cache that comes out again"
            )
            raise ModelFileError(
                f"{path} is not a decoder that can be run: expected {', '.join(_KNOWN)} and pairs of past "
                "and present, "
                f"found {found}."
            )

    def _check_budget(self, caches: Sequence[Port]) -> None:
        needed = cache_bytes(caches, self.context_length)
        if self.plan.ledger.total + needed > self.plan.budget_bytes:
            raise BudgetError(
                f"The KV cache of {self.context_length:,} tokens takes {format_size(needed)}, and the model "
                f"{format_size(self.plan.ledger.total)}: more than the budget of "
                f"{format_size(self.plan.budget_bytes)}. "
                "Give a smaller --ctx, or raise --memory.",
                self.plan.ledger.total + needed,
            )

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
        feeds = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, end)),
            "position_ids": np.arange(self.position, end)[None],
        }
        binding = self._session.io_binding()
        for port in self._inputs:
            binding.bind_cpu_input(port.name, feeds[port.name].astype(port.dtype))
        if self._last_only:
            binding.bind_ortvalue_input(_LAST_ONLY, self._one)
        binding.bind_output(self._logits.name)
        self._cache.bind(binding)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime could not run the decoder: {' '.join(str(error).split())[:500]}"
            ) from error
        names = [self._logits.name, *self._pairs.values()]
        results = dict(zip(names, binding.get_outputs()))
        self.logits = results[self._logits.name].numpy()[0, -1].copy()  # not a view of what is bound
        self._cache.take(results)
        self.position = end

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
        return DecoderStatistics(**{**values, "load_seconds": self._load_seconds})

    def close(self) -> None:
        self._session = None
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
    operators = {name for _, name in read_onnx(path).operators}
    model = open_onnx(path, memory=memory, threads=threads, progress=progress)
    try:
        return DecoderEngine(Path(path), model, "GroupQueryAttention" in operators, context_length, started)
    except BaseException:
        model.close()
        raise
