"""Measure what an expert cache lives from: how evenly a model uses its experts and how well they are guessed.

    python models/train/measure_routing.py --data DATA --work WORK

Runs the checkpoint of train_story.py --model story-moe over the held-out stories and prints a line a layer:
the smallest and largest share of tokens that use one expert; recall of the layer's experts when the gate
input of the layer before is given to this layer's gate (Fate, arXiv:2502.12224); recall when the experts of
the token before are guessed.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from model import CONFIGS, Model
from train_story import HERE, load_tokens


def gate_inputs(model: Model, ids: list[int]) -> list[torch.Tensor]:
    """What each layer's router gets for the tokens `ids`: one (tokens, width) a layer."""
    inputs: list[torch.Tensor] = []
    hooks = [layer.ffn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
             for layer in model.layers]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return inputs


def recall(wanted: torch.Tensor, guessed: torch.Tensor) -> float:
    """Share of the ids `wanted` (tokens, used) that are in `guessed` (tokens, guesses), token by token."""
    return (wanted[:, :, None] == guessed[:, None, :]).any(-1).float().mean().item()


@torch.no_grad()
def measure(model: Model, stories: list[list[int]]) -> list[dict[str, float]]:
    """One row a layer, shares from 0 to 1; the first layer has no layer before it."""
    num_used = model.config.num_experts_used
    cut = [story[:model.config.context_length] for story in stories]
    per_story = [gate_inputs(model, ids) for ids in cut]
    rows = []
    for number, layer in enumerate(model.layers):
        router = layer.ffn.router
        choices = [router(inputs[number])[2] for inputs in per_story]
        chosen = torch.cat(choices)
        use = torch.bincount(chosen.flatten(), minlength=model.config.num_experts) / len(chosen)
        current, previous = (torch.cat([c[part] for c in choices]) for part in (slice(1, None), slice(-1)))
        row = {"least used": use.min().item(), "most used": use.max().item(),
               "token before": recall(current, previous)}
        if number > 0:
            before = router.logits(torch.cat([inputs[number - 1] for inputs in per_story]))
            for guesses in (num_used, 2 * num_used):
                row[f"gate, top {guesses}"] = recall(chosen, before.topk(guesses).indices)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEINFER_TEST_DATA"))
    parser.add_argument("--work", type=Path, default=HERE / "cache")
    parser.add_argument("--model", choices=sorted(n for n, c in CONFIGS.items() if c.num_experts),
                        default="story-moe")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.model]
    tokens = load_tokens(arguments.data / "text", arguments.work, config.vocab_size)
    model = Model(config).eval()
    state = torch.load(arguments.work / f"{arguments.model}.pt", weights_only=True)
    model.load_state_dict(state["model"])
    print(f"step {state['step']}, {len(tokens.held_out)} stories")
    for number, row in enumerate(measure(model, tokens.held_out)):
        print(f"layer {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
