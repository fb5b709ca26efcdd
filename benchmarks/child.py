"""The process under test: loads a model, generates (or prefills), prints one JSON line.

    python -m benchmarks.child edgeinfer MODEL --memory BYTES --tokens 12
    python -m benchmarks.child stock MODEL --tokens 4
    python -m benchmarks.child plain MODEL --prefill 512

`plain` is edgeinfer's llama.cpp with all weights in memory and the kernels that streaming uses.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROMPT = "A river"


def major_faults() -> int:
    """Page faults of this process that had to read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def peak_memory_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("expected a line VmHWM in /proc/self/status, found none")


def prefill_tokens(count: int) -> list[int]:
    """`count` ordinary token ids; they are below 354, which every made vocabulary has."""
    return [259 + number * 37 % 90 for number in range(count)]


def edgeinfer_result(args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    import edgeinfer
    import edgeinfer.engines.opening  # load() would import it; libraries are not the model's load time

    import_seconds, started = time.perf_counter() - started, time.perf_counter()
    with edgeinfer.load(args.model, memory=args.memory, ctx=args.ctx, threads=args.threads) as model:
        load_seconds = time.perf_counter() - started
        if args.prefill:
            engine = model.engine
            result = _prefill(engine, args.prefill, lambda: engine.statistics().streamed_bytes)
        else:
            result = _generate(model.engine, args.tokens, started)
        result.update(import_seconds=import_seconds, load_seconds=load_seconds)
        result.update(_plan_numbers(model.engine))
    return result


def _generate(engine, num_tokens: int, started: float) -> dict:
    """Greedy decoding; behind every token one pass of reading alone, so that the disk is measured in the same minute."""
    from edgeinfer.engines.llama import Sampler

    sampler = Sampler(0, 1, None, engine.model)
    streaming = engine.mode == "streaming"
    rates, streamed, waited = [], [], []

    def step(tokens: Sequence[int]) -> int:
        before = engine.statistics()
        engine.decode(tokens)
        after = engine.statistics()
        streamed.append(after.streamed_bytes - before.streamed_bytes)
        waited.append(after.wait_seconds - before.wait_seconds)
        return engine.sample(sampler)

    def read_alone() -> None:
        before = time.perf_counter()
        if streaming:
            num_bytes = engine.read_pass()
            rates.append(num_bytes / (time.perf_counter() - before))

    prompt = engine.model.tokenize(PROMPT, True, True)
    result = _decode_loop(step, prompt, num_tokens, started, read_alone)
    return {
        **result,
        "streamed_bytes_per_token": statistics.mean(streamed[1:]),
        "disk_wait_fraction": statistics.median(waited[1:]) / result["median_token_seconds"],
        "read_alone_bytes_per_second": statistics.median(rates) if rates else None,
    }


def _plan_numbers(engine) -> dict:
    from edgeinfer.modelfile import read_model_file

    plan = engine.plan
    file = read_model_file(engine.model.path)
    sizes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    return {
        "mode": engine.mode,
        "budget_bytes": plan.budget_bytes,
        "overhead_bytes": plan.overhead_bytes,
        "resident_bytes": plan.ledger.entries.get("resident_weights", 0),
        "ring_bytes": plan.ring_bytes,
        "planned_streamed_bytes": sum(sizes[name] for name in plan.streamed),
        "pass_weight_bytes": sum(sizes[name] for name in plan.resident | plan.streamed),
    }


def _prefill(context, count: int, streamed_bytes: Callable[[], int] = lambda: 0) -> dict:
    """Seconds and bytes for `count` tokens, after one token has brought in what stays in memory."""
    tokens = prefill_tokens(count)
    context.decode(tokens[:1])
    context.truncate(0)
    before, started = streamed_bytes(), time.perf_counter()
    context.decode(tokens)
    seconds = time.perf_counter() - started
    return {
        "prefill_tokens": count,
        "prefill_tokens_per_second": count / seconds,
        "prefill_streamed_bytes": streamed_bytes() - before,
    }


def plain_result(args: argparse.Namespace) -> dict:
    import llama_cpp

    from edgeinfer.engines.llama import LlamaContext, LlamaModel, Sampler

    started = time.perf_counter()
    model = LlamaModel(args.model, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE, use_extra_bufts=False)
    context = LlamaContext(model, context_length=args.ctx, threads=args.threads, flash_attention=None)
    load_seconds = time.perf_counter() - started
    if args.prefill:
        result = _prefill(context, args.prefill)
    else:
        sampler = Sampler(0, 1, None, model)

        def step(tokens: Sequence[int]) -> int:
            context.decode(tokens)
            return sampler.sample(context)

        result = _decode_loop(step, model.tokenize(PROMPT, True, True), args.tokens, started)
    return {"load_seconds": load_seconds, **result}


def stock_result(args: argparse.Namespace) -> dict:
    from benchmarks.stock import StockModel

    started = time.perf_counter()
    model = StockModel(args.model, context_length=args.ctx, threads=args.threads, repack=args.repack)
    load_seconds = time.perf_counter() - started
    result = _decode_loop(model.decode, model.tokenize(PROMPT), args.tokens, started)
    model.close()
    return {"load_seconds": load_seconds, "repack": args.repack, **result}


def _decode_loop(
    step: Callable, prompt: list[int], count: int, started: float, between: Callable[[], None] = lambda: None
) -> dict:
    """The first token, then `count` more, each timed; `between` runs before each of them."""
    tokens = [step(prompt)]
    first_token_seconds = time.perf_counter() - started
    faults, token_seconds = major_faults(), []
    for _ in range(count):
        between()
        before = time.perf_counter()
        tokens.append(step(tokens[-1:]))
        token_seconds.append(time.perf_counter() - before)
    return {
        "first_token_seconds": first_token_seconds,
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "tokens_per_second": 1 / sorted(token_seconds)[count // 2],
        "median_token_seconds": sorted(token_seconds)[count // 2],
        "major_faults_per_token": (major_faults() - faults) / count,
    }


ENGINES = {"edgeinfer": edgeinfer_result, "stock": stock_result, "plain": plain_result}


def main(arguments: Sequence[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child", description=description)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--memory", type=int, help="budget in bytes (edgeinfer)")
    parser.add_argument("--tokens", type=int, default=12, help="to decode after the first one")
    parser.add_argument(
        "--prefill", type=int, default=0, help="measure the prefill of so many tokens instead"
    )
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", action="store_true", help="weights repacked for this processor (stock)")
    args = parser.parse_args(arguments)
    result = ENGINES[args.engine](args)
    print(json.dumps({"engine": args.engine, **result, "peak_memory_bytes": peak_memory_bytes()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
