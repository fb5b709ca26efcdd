"""How well a model predicts a text, as llama.cpp's perplexity tool measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgeinfer.exporters.windows import CONTEXT, check_context, logits_of, scoring_engine, windows
from edgeinfer.modelfile import read_model_file


@dataclass(frozen=True)
class LossDifference:
    """Nats a token that one model loses more than another on the same tokens, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss. `error`: its standard error; `tokens`: how many were scored; `losses`: nats of each."""

    value: float
    error: float
    tokens: int
    losses: np.ndarray = field(repr=False, compare=False)

    @staticmethod
    def of(losses: np.ndarray) -> Perplexity:
        value = float(np.exp(losses.mean()))
        error = value * float(losses.std()) / np.sqrt(max(1, len(losses) - 1))
        return Perplexity(value, float(error), len(losses), losses)

    def difference(self, other: Perplexity) -> LossDifference:
        """What this loses more than `other` of the same text, token by token: surer than their values."""
        differences = self.losses - other.losses
        error = float(differences.std()) / np.sqrt(max(1, len(differences) - 1))
        return LossDifference(float(differences.mean()), float(error))


def perplexity(
    model: Path,
    text: str,
    *,
    context: int = CONTEXT,
    most_windows: int | None = None,
    memory: int | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """The perplexity of the GGUF file `model` on `text`, as llama.cpp's tool defines it (without a stride).

    The text is tokenized once, with BOS where the vocabulary wants one, and cut into windows of `context`
    tokens (or of what the model was trained for, if that is less); a rest at the end is dropped. A BOS takes
    the place of each window's first token. Each window is computed alone, and its tokens `context // 2 + 1`
    to the last are scored, by the natural logarithm of the probability that the model gives each of them. The
    value is exp(-mean), its error the standard error of the mean times the value. Attention is what llama.cpp
    takes by itself (flash attention, a cache in float16); weights are not repacked.

    `most_windows`: no more than so many, spread over the text. `memory`: stay within so many bytes, by
    streaming where the model is larger (None: what is free). Raises ExportError where the text has not one
    window, and what `edgeinfer.load` raises.
    """
    context = check_context(read_model_file(model), context)
    losses: list[float] = []
    with scoring_engine(model, context=context, memory=memory, threads=threads) as engine:
        parts = windows(engine.model, text, context, "perplexity")
        parts = parts[:: -(-len(parts) // most_windows)] if most_windows else parts
        for number, window in enumerate(parts):

            def score(position: int, logits: np.ndarray, window=window) -> None:
                if position + 1 < context:
                    losses.append(negative_log_probability(logits, window[position + 1]))

            def report(share: float, number=number) -> None:
                if progress is not None:
                    progress((number + share) / len(parts))

            logits_of(engine, window, context // 2, score, report)
    return Perplexity.of(np.array(losses))


def negative_log_probability(logits: np.ndarray, token: int) -> float:
    """-log softmax(logits)[token], in nats; the sum in float64."""
    largest = logits.max()
    return float(
        np.log(np.exp(logits - largest).sum(dtype=np.float64)) + float(largest) - float(logits[token])
    )
