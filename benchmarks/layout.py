"""What a file's layout is worth: the same model in several files, decoded side by side, token by token in
turn.

    python -m benchmarks.maker a.gguf --arch deepseek2 --type Q4_0 ...
    edgeinfer layout a.gguf -o b.gguf
    python -m benchmarks.layout a.gguf b.gguf --share 0.5

All files are open in one process, with the same plan, so that what else the machine does meets all of them
alike: each token's time is compared with that of the first file's same token. The budget is each one's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cgroup import drop_page_cache
from edgeinfer.engines.gguf import GGUFEngine
from edgeinfer.engines.opening import Prepared
from edgeinfer.modelfile import read_model_file
from edgeinfer.plan import Plan

PROMPT = "A river"


@dataclass
class Run:
    """One file's tokens: seconds, seconds of all its threads, bytes read, and seconds of waiting for the disk
    of each.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def step(self, engine: GGUFEngine, tokens: Sequence[int]) -> None:
        before, cpu, started = engine.statistics(), time.process_time(), time.perf_counter()
        engine.decode(tokens)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu)
        after = engine.statistics()
        self.read_bytes.append(after.streamed_bytes - before.streamed_bytes)
        self.wait_seconds.append(after.wait_seconds - before.wait_seconds)
        self.tokens.append(int(engine.context.logits().argmax()))

    def facts(self, first: Run, warmup: int) -> dict:
        """Medians over the tokens behind the warm-up, and over each token's ratio to the first file's."""
        kept = slice(warmup, None)
        ratios = [theirs / own for own, theirs in zip(self.seconds[kept], first.seconds[kept])]
        quarters = statistics.quantiles(ratios, n=4)
        return {
            "name": self.name,
            "median_token_seconds": statistics.median(self.seconds[kept]),
            "median_cpu_seconds": statistics.median(self.cpu_seconds[kept]),
            "read_bytes_per_token": statistics.mean(self.read_bytes[kept]),
            "median_wait_seconds": statistics.median(self.wait_seconds[kept]),
            "speed": statistics.median(ratios),
            "speed_quarters": [quarters[0], quarters[2]],
            "same_tokens": self.tokens == first.tokens,
        }


def measure(
    models: list[Path], share: float, tokens: int, warmup: int, threads: int, predict: bool
) -> list[Run]:
    """Decode `warmup + tokens` tokens with each. The budget is `share` of the first file's weights and the
    overhead.
    """
    files = [read_model_file(model) for model in models]
    drop_page_cache([path for file in files for path in file.paths])
    runs = [Run(model.name) for model in models]
    with ExitStack() as stack:
        prepared = [Prepared(file, context_length=512, threads=threads) for file in files]
        for item in prepared:
            stack.callback(item.close)
        plans = _like_plans(prepared, round(files[0].weights_bytes * share), predict)
        engines = [item.start(plan) for item, plan in zip(prepared, plans)]
        stack.pop_all()
        for engine in engines:
            stack.callback(engine.close)
        prompt = engines[0].model.tokenize(PROMPT, True, True)
        following: list[Sequence[int]] = [prompt] * len(engines)
        for number in range(1 + warmup + tokens):
            for place in sorted(range(len(engines)), key=lambda place: (place + number) % len(engines)):
                runs[place].step(engines[place], following[place])
                following[place] = runs[place].tokens[-1:]
    return runs


def _like_plans(prepared: list[Prepared], weights_bytes: int, predict: bool) -> list[Plan]:
    """Plans that hold as much of each file: the same weights, and caches of as many experts."""
    plans = [item.plan(weights_bytes + sum(item.overhead.values())) for item in prepared]
    if any(plan.mode != "streaming" for plan in plans):
        raise SystemExit("benchmarks.layout: all of the model fits. Give a smaller --share.")
    if plans[0].pools is None:
        return [plans[0]] * len(plans)
    slots = [min(counts) for counts in zip(*(plan.pools.slots for plan in plans))]
    return [replace(plan, pools=replace(plan.pools, slots=tuple(slots), predict=predict)) for plan in plans]


def table(facts: list[dict]) -> str:
    lines = []
    for own in facts:
        low, high = own["speed_quarters"]
        lines.append(
            f"{own['name']}: {own['speed']:.3f} times the first's speed (half of the tokens: {low:.3f} to "
            f"{high:.3f}); "
            f"{own['median_token_seconds']:.4f} s a token, {own['median_wait_seconds']:.4f} s of it waiting, "
            f"{own['median_cpu_seconds']:.4f} s of processors, "
            f"{own['read_bytes_per_token'] / 1e6:.1f} MB read; "
            f"{'same' if own['same_tokens'] else 'OTHER'} tokens"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the weights that each may keep in memory"
    )
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20, help="tokens before those that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-predict", action="store_true", help="no experts are read ahead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    args = parser.parse_args()
    runs = measure(args.models, args.share, args.tokens, args.warmup, args.threads, not args.no_predict)
    facts = [run.facts(runs[0], 1 + args.warmup) for run in runs]
    print(table(facts))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
