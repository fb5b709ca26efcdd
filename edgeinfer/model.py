"""`load` a model and let it write: the Python interface of edgeinfer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import EngineError, PromptError
from edgeinfer.generate import Generation, Progress, check_prompt, generate
from edgeinfer.kind import model_kind

if TYPE_CHECKING:
    from edgeinfer.engines.onnx import OnnxModel


@dataclass(frozen=True)
class Stats:
    """The last generation of a model in numbers (those of `edgeinfer run --json`, in its order)."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    load_seconds: float = 0.0
    time_to_first_token_seconds: float | None = None  # None: there was none
    tokens_per_second: float | None = None  # after the first token; None: there was no second one
    budget_bytes: int = 0
    peak_memory_bytes: int = 0  # of the whole process so far
    resident_bytes: int = 0  # weights that stay in memory
    streamed_bytes_per_token: float = 0.0
    disk_bytes_per_second: float | None = None  # while reading; None: nothing was read
    disk_wait_fraction: float = 0.0  # of the time after the first token
    mode: str = "in-memory"  # or "streaming"
    # Of a cache of experts, while decoding; None without one.
    expert_hit_rate: float | None = None  # in memory when they were wanted
    prediction_precision: float | None = None  # predicted experts that were wanted
    prediction_recall: float | None = None  # wanted experts that were predicted, where there was a prediction


def load(
    path: str | os.PathLike | None = None,
    memory: int | str | None = None,
    ctx: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Model | OnnxModel:
    """Open a model that may use `memory`: bytes, "2GiB", "50%"; None: what is available less a reserve.

    A GGUF file, and an ONNX decoder beside its tokenizer.json, gives a Model, which generates text; any other
    ONNX file an OnnxModel with `run` and `stream`: the content decides. `path` None is the embedded default
    model. `ctx`: tokens of context; `threads`: computing threads; None lets edgeinfer choose. `progress` is called with the loaded fraction. Raises
    ModelFileError, BudgetError and EngineError; ValueError for numbers that mean nothing.
    """
    for name, value in (("ctx", ctx), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if path is not None and model_kind(path) == "onnx":
        return _load_onnx(path, memory, ctx, threads, progress)
    from edgeinfer.engines.opening import open_engine
    from edgeinfer.models import default_model_path

    path = default_model_path() if path is None else path
    return Model(open_engine(path, memory=memory, context_length=ctx, threads=threads, progress=progress))


def _load_onnx(
    path: str | os.PathLike,
    memory: int | str | None,
    ctx: int | None,
    threads: int | None,
    progress: Progress | None,
) -> Model | OnnxModel:
    from edgeinfer.engines.decoder import is_decoder_file, open_decoder
    from edgeinfer.engines.onnx import open_onnx

    options = {"memory": memory, "threads": threads, "progress": progress}
    if is_decoder_file(path):
        return Model(open_decoder(path, context_length=ctx, **options))
    if ctx is not None:
        raise ValueError(f"expected no ctx for an ONNX model that does not write, got {ctx} for {path}")
    return open_onnx(path, **options)


class Model:
    """A loaded model. One generation at a time; close it, or use it as a context manager."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._cached: list[int] = []  # the tokens whose keys and values the engine holds
        self._current = Generation()
        self._formatter: Any = None
        self._stats = self._make_stats(self._current, None)

    @property
    def engine(self) -> Any:
        """The engine underneath, which holds the plan."""
        if self._engine is None:
            raise EngineError("The model is closed. Load it again.")
        return self._engine

    @property
    def mode(self) -> str:
        """How the weights are held: "streaming", or "in-memory" when everything fits."""
        return self.engine.mode

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    @property
    def has_chat_template(self) -> bool:
        return self.engine.model.chat_template is not None

    @property
    def stats(self) -> Stats:
        """Numbers of the last generation, also after it was stopped."""
        return self._stats

    @property
    def finish(self) -> str | None:
        """Why the last generation ended: "end", "stop", "length", "context"; None: it was stopped."""
        return self._current.finish

    def generate(self, prompt: str, **options: Any) -> Iterator[str]:
        """Continue `prompt` and yield the text piece by piece. The options are those of `chat`.

        The prompt is used as it is, without a chat template; names of control tokens in it are read as such.
        """
        tokens = self.engine.model.tokenize(prompt, add_special=True, parse_special=True)
        return self._run(tokens, reuse=False, **options)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[str]:
        """Answer `messages` ({"role": "user", "content": "..."}, oldest first) piece by piece.

        The model's own chat template is used; a model without one continues the contents as one text. What
        the KV cache already holds of the conversation is not computed again. Options: `max_tokens` (None:
        until the model ends or the context is full), `temperature` (0: the most probable token), `top_p`,
        `seed` (None: a fresh one), `stop` (strings that end the answer and are not shown), `progress` (called
        with the fraction of the prompt that is read). Raises PromptError, ReadError, EngineError.
        """
        return self._run(self.chat_tokens(messages), reuse=True, **options)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids that `chat` would give to the model."""
        if not messages:
            raise PromptError("There are no messages to answer.")
        vocabulary = self.engine.model
        if not self.has_chat_template:
            text = "\n".join(message["content"] for message in messages)
            return vocabulary.tokenize(text, add_special=True, parse_special=True)
        return vocabulary.tokenize(self._format(messages), add_special=False, parse_special=True)

    def _format(self, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        vocabulary = self.engine.model
        try:
            if self._formatter is None:
                self._formatter = Jinja2ChatFormatter(
                    vocabulary.chat_template, eos_token=vocabulary.eos_text, bos_token=vocabulary.bos_text
                )
            return self._formatter(messages=list(messages)).prompt
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise PromptError(f"The model's chat template refused the messages: {error}") from error

    def _run(
        self,
        tokens: list[int],
        reuse: bool,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Iterator[str]:
        _check_options(max_tokens, temperature, top_p, seed)
        check_prompt(self.engine, tokens)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)

        def pieces() -> Iterator[str]:
            generation = self._current = Generation()
            before = self.engine.statistics()
            self._keep_prefix(tokens if reuse else [])
            sampler = self.engine.make_sampler(temperature, top_p, seed)
            options = {"max_tokens": max_tokens, "stop": stop, "progress": progress}
            try:
                for text in generate(self.engine, sampler, tokens, generation, **options):
                    yield text
                    if self._current is not generation:
                        raise EngineError("This generation was ended by a later one of the same model.")
            finally:
                sampler.close()
                if self._current is generation and self._engine is not None:
                    self._cached = (tokens + generation.tokens)[: self._engine.position]
                    self._stats = self._make_stats(generation, before)

        return pieces()

    def _keep_prefix(self, tokens: Sequence[int]) -> None:
        """Cut the engine's sequence to what it has in common with `tokens`, but leave one to compute."""
        common = 0
        for cached, token in zip(self._cached, tokens[:-1]):
            if cached != token:
                break
            common += 1
        self.engine.truncate(min(common, self.engine.position))
        if self.engine.position != common:  # a recurrent state cannot be cut back
            self.engine.truncate(0)
        self._cached = self._cached[: self.engine.position]

    def _make_stats(self, generation: Generation, before: Any) -> Stats:
        now = self.engine.statistics()
        decodes, first = generation.decodes, generation.after_prefill
        if first is None:
            streamed, waited = 0.0, 0.0
        elif decodes:
            streamed = (now.streamed_bytes - first.streamed_bytes) / decodes
            waited = (now.wait_seconds - first.wait_seconds) / generation.decode_seconds
        else:  # one token: its pass was the prefill
            streamed = float(first.streamed_bytes - before.streamed_bytes)
            waited = (first.wait_seconds - before.wait_seconds) / generation.prefill_seconds
        return Stats(
            text=generation.text,
            tokens=list(generation.tokens),
            prompt_tokens=generation.prompt_tokens,
            generated_tokens=len(generation.tokens),
            load_seconds=now.load_seconds,
            time_to_first_token_seconds=generation.prefill_seconds if first else None,
            tokens_per_second=decodes / generation.decode_seconds if decodes else None,
            budget_bytes=now.budget_bytes,
            peak_memory_bytes=now.peak_memory_bytes,
            resident_bytes=now.resident_bytes,
            streamed_bytes_per_token=streamed,
            disk_bytes_per_second=now.disk_bytes_per_second,
            disk_wait_fraction=min(1.0, max(0.0, waited)),
            mode=self.engine.mode,
            **_expert_rates(first.experts if first else None, now.experts),
        )

    def close(self) -> None:
        """Give back all memory, threads and files. The numbers in `stats` stay."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _expert_rates(before: Any, now: Any) -> dict[str, float]:
    """Rates of what happened between two counts of the cache of experts; none where nothing was counted."""
    if before is None or now is None:
        return {}

    def rate(part: str, whole: str) -> float | None:
        total = getattr(now, whole) - getattr(before, whole)
        return (getattr(now, part) - getattr(before, part)) / total if total else None

    return {
        "expert_hit_rate": rate("hits", "wanted"),
        "prediction_precision": rate("predicted_right", "predicted"),
        "prediction_recall": rate("predicted_right", "predicted_wanted"),
    }


def _check_options(max_tokens: int | None, temperature: float, top_p: float, seed: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"expected max_tokens of at least 1, got {max_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"expected a temperature of 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"expected a top_p above 0 and at most 1, got {top_p}")
    if seed is not None and not 0 <= seed < 2**32 - 1:
        raise ValueError(f"expected a seed of 0 to {2**32 - 2}, got {seed}")
