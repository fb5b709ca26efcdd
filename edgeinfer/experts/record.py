"""From what the engine logs of its routers to a trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeinfer.errors import TraceError
from edgeinfer.experts.trace import Trace, model_fingerprint
from edgeinfer.modelfile import ModelFile

_CHOICE, _PREDICTION = 0, 1  # routing_entry_kind of native/routing_log.h


def make_trace(
    file: ModelFile, layers: tuple[tuple[str, ...], ...], num_experts: int, log: bytes, prompt_tokens: int
) -> Trace:
    """The trace of one sequence, of which the first `prompt_tokens` tokens were a prompt.

    `layers`: names of the expert weights of each layer with experts; `log`: as `Hook.take_routing` gives it.
    """
    passes: list[dict[int, np.ndarray]] = []
    predictions: list[tuple[int, int, np.ndarray]] = []
    for kind, layer, numbers in _entries(log):
        if kind == _PREDICTION:  # by the layer before, of the token that is being decoded
            predictions.append((len(passes) - 1, layer, numbers[0]))
            continue
        if not passes or layer in passes[-1]:
            passes.append({})
        passes[-1][layer] = numbers
    if not passes:
        raise TraceError("Nothing was recorded: no token was computed. Give a prompt with -p.")
    ends = np.cumsum([max(len(rows) for rows in found.values()) for found in passes])
    used = max(rows.shape[1] for found in passes for rows in found.values())
    routed = np.full((ends[-1], len(layers), used), -1, np.int16)
    for end, found in zip(ends, passes):
        for layer, rows in found.items():  # llama.cpp computes the last layer for tokens that have an output only
            routed[end - len(rows) : end, layer, : rows.shape[1]] = rows
    ranked = max((len(numbers) for _, _, numbers in predictions), default=0)
    predicted = np.full((ends[-1], len(layers), ranked), -1, np.int16) if ranked else None
    for number, layer, numbers in predictions:
        predicted[ends[number] - 1, layer, : len(numbers)] = numbers
    return Trace(
        model=file.name,
        architecture=file.architecture,
        fingerprint=model_fingerprint(file),
        num_experts=num_experts,
        routed=routed,
        decode=np.arange(ends[-1]) >= prompt_tokens,
        expert_bytes=np.array(
            [sum(file.tensor(name).nbytes // num_experts for name in names) for names in layers], np.int64
        ),
        predicted=predicted,
    )


def _entries(log: bytes) -> Iterator[tuple[int, int, np.ndarray]]:
    """(kind, layer, numbers of shape (tokens, experts)) in the order of computing."""
    numbers = np.frombuffer(log, np.int32)
    at = 0
    while at < len(numbers):
        kind, layer, rows, columns = numbers[at : at + 4]
        at += 4
        yield int(kind), int(layer), numbers[at : at + rows * columns].reshape(rows, columns)
        at += rows * columns
