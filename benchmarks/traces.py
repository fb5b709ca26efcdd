"""Made routing, to judge cache policies where the right answer is known.

    python -m benchmarks.traces skewed.npz --change

Each token draws its experts of a layer without replacement, the expert of rank r with a weight of
1 / r ** exponent. Which expert has which rank differs from layer to layer, and from the middle on where the
popularity changes. With a recurrence, each expert of the token before is kept with that probability, and only
the rest is drawn.
"""

from __future__ import annotations

import argparse

import numpy as np

from edgeinfer.experts.trace import Trace

EXPERT_BYTES = 1 << 20


def made_trace(
    tokens: int = 600,
    layers: int = 24,
    experts: int = 64,
    used: int = 8,
    *,
    exponent: float = 1.0,
    change: bool = False,
    recurrence: float = 0.0,
    prompt: int = 0,
    seed: int = 0,
) -> Trace:
    """A trace of decoded tokens, the first `prompt` of them as a prompt, of experts of 1 MiB each."""
    rng = np.random.default_rng(seed)
    routed = np.empty((tokens, layers, used), np.int16)
    weights = np.log(1.0 / np.arange(1, experts + 1) ** exponent)
    middle = tokens // 2 if change else tokens
    for layer in range(layers):
        orders = [rng.permutation(experts) for _ in range(2)]
        # The largest of log weight + Gumbel noise are a draw without replacement.
        scores = rng.gumbel(size=(tokens, experts))
        scores[:middle, orders[0]] += weights
        scores[middle:, orders[1]] += weights
        for token in range(tokens):
            if recurrence and token:
                last = routed[token - 1, layer]
                scores[token, last[rng.random(used) < recurrence]] = np.inf
            routed[token, layer] = np.argpartition(-scores[token], used - 1)[:used]
    return Trace(
        model="made routing",
        architecture="none",
        fingerprint="0" * 64,
        num_experts=experts,
        routed=routed,
        decode=np.arange(tokens) >= prompt,
        expert_bytes=np.full(layers, EXPERT_BYTES, np.int64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the trace to write (.npz)")
    for name, default in (
        ("tokens", 600),
        ("layers", 24),
        ("experts", 64),
        ("used", 8),
        ("prompt", 0),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--exponent", type=float, default=1.0, help="0 for routing that is spread evenly")
    parser.add_argument(
        "--recurrence", type=float, default=0.0, help="share of its experts that a token keeps"
    )
    parser.add_argument("--change", action="store_true", help="popularity changes half-way")
    options = vars(parser.parse_args())
    path = options.pop("file")
    made_trace(**options).write(path)


if __name__ == "__main__":
    main()
