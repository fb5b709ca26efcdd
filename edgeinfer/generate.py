"""The token loop: prefill the prompt, then sample, show and decode one token after the other."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeinfer.errors import PromptError

Progress = Callable[[float], None]  # is given the finished fraction, 0 to 1


@dataclass
class Generation:
    """What one generation has done so far."""

    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)  # generated ids, without the one that ended it
    text: str = ""
    finish: str | None = None  # "end" (the model's own), "stop", "length", "context"; None: not finished
    prefill_seconds: float = 0.0  # until the first token was known
    decode_seconds: float = 0.0  # spent on the `decodes` that followed
    decodes: int = 0
    after_prefill: Any = None  # the engine's statistics when the first token was known


class TextStream:
    """Turns token bytes into text that can be shown at once.

    Bytes of an unfinished character and text that may become a stop string are held back until they are
    decided; bytes that are no UTF-8 are dropped, as stock llama-cpp-python does.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes, final: bool = False) -> str:
        """The text that `data` makes certain."""
        self._held += self._decoder.decode(data, final)
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = 0 if final else max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def generate(
    engine: Any,
    sampler: Any,
    prompt: Sequence[int],
    generation: Generation,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[str]:
    """Continue `prompt` (token ids) and yield the text as it comes; `generation` is filled on the way.

    The engine's sequence must hold the first `engine.position` tokens of `prompt`, and not all of them.
    Ends at the model's end token, a stop string, `max_tokens`, or when the context is full. Raises
    PromptError for a prompt that is empty or longer than the context, and whatever the engine raises.
    """
    check_prompt(engine, prompt)
    generation.prompt_tokens = len(prompt)
    stream = TextStream(stop)
    start = time.perf_counter()
    engine.prefill(list(prompt[engine.position :]), _prefill_progress(engine, progress))
    token = engine.sample(sampler)
    generation.prefill_seconds = time.perf_counter() - start
    generation.after_prefill = engine.statistics()
    while True:
        if engine.model.is_end(token):
            generation.finish = "end"
            break
        generation.tokens.append(token)
        if text := stream.feed(engine.model.token_bytes(token)):
            generation.text += text
            yield text
        if stream.stopped:
            generation.finish = "stop"
        elif len(generation.tokens) == max_tokens:
            generation.finish = "length"
        elif engine.position >= engine.context_length:
            generation.finish = "context"
        if generation.finish:
            break
        start = time.perf_counter()
        engine.decode([token])
        token = engine.sample(sampler)
        generation.decode_seconds += time.perf_counter() - start
        generation.decodes += 1
    if not stream.stopped and (text := stream.feed(b"", final=True)):
        generation.text += text
        yield text


def check_prompt(engine: Any, prompt: Sequence[int]) -> None:
    """Raise PromptError for a prompt that is empty or longer than the context."""
    if not prompt:
        raise PromptError("The prompt is empty. Give the model at least one word to continue.")
    if len(prompt) > engine.context_length:
        trained = engine.model.train_context
        advice = (
            f", or give a larger context with --ctx (this model was trained with {trained:,})"
            if engine.context_length < trained
            else ": the context is already as long as this model was trained with"
        )
        raise PromptError(
            f"The prompt has {len(prompt):,} tokens, but the context holds {engine.context_length:,}. "
            f"Shorten the prompt{advice}."
        )


def _prefill_progress(engine: Any, progress: Progress | None) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None

    def report(done: int, total: int, fraction_of_pass: float) -> None:
        in_this_pass = min(engine.context.ubatch, total - done)
        progress((done + fraction_of_pass * in_this_pass) / total)

    return report
