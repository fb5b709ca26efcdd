"""A trace as the engine asks for it: groups of experts that are needed at once, one group after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeinfer.experts.trace import Trace

#: Tokens of a prompt that go through the model together.
BATCH = 512


@dataclass(frozen=True, eq=False)
class Accesses:
    """Wanted experts in their order: `keys` (int32); a group begins at each of `group_starts` (int32).

    `token` (int32) and `decode` (bool) have one value a key: the (first) token that wants it, and its phase.
    """

    keys: np.ndarray
    group_starts: np.ndarray
    token: np.ndarray
    decode: np.ndarray


def accesses(trace: Trace, num_slots: int, batch: int = BATCH) -> Accesses:
    """What a trace asks of a cache of `num_slots` experts.

    A decoded token wants a layer's experts as one group. Tokens of a prompt go together, up to `batch`, and
    want each of the layer's experts once; where those are more than the slots, the batch is halved until they
    are not. ValueError where one token's experts are more than the slots.
    """
    if trace.num_used > num_slots:
        raise ValueError(f"expected at least {trace.num_used} slots, got {num_slots}")
    keys, lengths, tokens = [], [], []
    token = 0
    while token < trace.num_tokens:
        if trace.decode[token]:
            end = _end_of_phase(trace, token)
            _add_decoded(trace, token, end, keys, lengths, tokens)
        else:
            end = min(_end_of_phase(trace, token), token + batch)
            end = _add_batch(trace, token, end, num_slots, keys, lengths, tokens)
        token = end
    lengths = np.concatenate(lengths)
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate(tokens).astype(np.int32)
    return Accesses(
        np.concatenate(keys).astype(np.int32), starts.astype(np.int32), tokens, trace.decode[tokens]
    )


def _end_of_phase(trace: Trace, token: int) -> int:
    other = np.flatnonzero(trace.decode[token:] != trace.decode[token])
    return token + int(other[0]) if len(other) else trace.num_tokens


def _add_decoded(trace: Trace, start: int, end: int, keys: list, lengths: list, tokens: list) -> None:
    routed = trace.routed[start:end]
    wanted = routed >= 0
    layer = np.arange(trace.num_layers, dtype=np.int32)[None, :, None]
    keys.append((routed + layer * trace.num_experts)[wanted])
    lengths.append(wanted.sum(axis=2).ravel())
    tokens.append(np.repeat(np.arange(start, end), wanted.sum(axis=(1, 2))))


def _add_batch(
    trace: Trace, start: int, end: int, slots: int, keys: list, lengths: list, tokens: list
) -> int:
    """Adds the tokens from `start` to the end that is returned."""
    while True:
        wanted = [np.unique(layer[layer >= 0]) for layer in np.moveaxis(trace.routed[start:end], 1, 0)]
        if max(map(len, wanted)) <= slots:
            break
        end = start + (end - start) // 2
    for layer, experts in enumerate(wanted):
        keys.append(experts.astype(np.int32) + layer * trace.num_experts)
        tokens.append(np.full(len(experts), start))
    lengths.append(np.array([len(experts) for experts in wanted]))
    return end
