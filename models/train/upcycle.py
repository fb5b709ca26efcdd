"""Start a model with experts from a trained dense one (sparse upcycling, arXiv:2212.05055).

Embedding, norms and attention are taken over. Each expert starts as a slice of its layer's neurons;
neighbouring slices overlap where the experts hold more neurons in all than the dense layer. Layers beyond the
dense model's start as its last one whose attention adds nothing yet.
"""
from __future__ import annotations

import torch

from model import Model


@torch.no_grad()
def start_from_dense(model: Model, dense: dict[str, torch.Tensor]) -> None:
    """Fill `model` (with experts) from the parameters `dense` of a model of the same width and heads."""
    last = max(int(name.split(".")[1]) for name in dense if name.startswith("layers."))
    own = model.state_dict()
    for name, values in own.items():
        parts = name.split(".")
        source = name
        if parts[0] == "layers":
            source = ".".join(["layers", str(min(int(parts[1]), last)), *parts[2:]])
        if source in dense:
            values.copy_(dense[source])
    for number, layer in enumerate(model.layers):
        if number > last:
            layer.attention.out.weight.zero_()
        prefix = f"layers.{min(number, last)}.ffn."
        experts = layer.ffn.experts
        for position, expert in enumerate(experts):
            total, length = dense[prefix + "gate.weight"].shape[0], expert.gate.weight.shape[0]
            neurons = (torch.arange(length) + position * total // len(experts)) % total
            expert.gate.weight.copy_(dense[prefix + "gate.weight"][neurons])
            expert.up.weight.copy_(dense[prefix + "up.weight"][neurons])
            # The shares of the chosen experts sum to 1: undo them, so that a chosen neuron adds what it did.
            expert.down.weight.copy_(dense[prefix + "down.weight"][:, neurons] * layer.ffn.router.num_used)
