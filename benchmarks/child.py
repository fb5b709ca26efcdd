"""The process under test: loads a model, generates (or prefills), prints one JSON line.

    python -m benchmarks.child edgeinfer MODEL --memory BYTES --tokens 12
    python -m benchmarks.child stock MODEL --tokens 4
    python -m benchmarks.child plain MODEL --prefill 512
    python -m benchmarks.child edgeinfer MODEL --memory BYTES --policy lru --no-predict

`plain` is edgeinfer's llama.cpp with all weights in memory and the kernels that streaming uses.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

PROMPT = "A river"
METER_BYTES = 150_000_000  # about what a token misses in a cache of half of the experts


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
    import edgeinfer.engines.opening  # noqa: F401  load() would import it; libraries are not the model's load time

    import_seconds, started = time.perf_counter() - started, time.perf_counter()
    with _opened(args) as engine:
        load_seconds = time.perf_counter() - started
        if args.prefill:
            result = _prefill(engine, args.prefill, lambda: engine.statistics().streamed_bytes)
        else:
            result = _generate(engine, args.tokens, started, args.warmup)
        result.update(import_seconds=import_seconds, load_seconds=load_seconds)
        result.update(_plan_numbers(engine))
    return result


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator:
    """The engine that edgeinfer.load opens; another cache of experts may be asked for, the rest of the plan stays."""
    import edgeinfer
    from edgeinfer.engines.opening import Prepared
    from edgeinfer.modelfile import read_model_file

    if args.policy is None and not args.no_predict:
        with edgeinfer.load(args.model, memory=args.memory, ctx=args.ctx, threads=args.threads) as model:
            yield model.engine
        return
    prepared = Prepared(read_model_file(args.model), context_length=args.ctx, threads=args.threads)
    plan = prepared.plan(args.memory)
    if plan.pools is None:
        raise ValueError("expected a plan with a cache of experts for --policy and --no-predict, found none")
    policy = args.policy or plan.pools.policy
    pools = replace(plan.pools, policy=policy, predict=plan.pools.predict and not args.no_predict)
    with closing(prepared.start(replace(plan, pools=pools))) as engine:
        yield engine


def _generate(engine, num_tokens: int, started: float, warmup: int = 0) -> dict:
    """Greedy decoding; behind every token reading alone, so that the disk is measured in the same minute: one pass of
    what is streamed, or with a cache of experts about what a token misses.
    """
    from benchmarks.disk import ExpertMeter
    from edgeinfer.engines.llama import Sampler
    from edgeinfer.modelfile import read_model_file

    sampler = Sampler(0, 1, None, engine.model)
    streaming = engine.mode == "streaming"
    pools = engine.plan.pools
    meter = ExpertMeter(read_model_file(engine.model.path)) if pools else None
    rates, streamed, waited, experts = [], [], [], []

    def step(tokens: Sequence[int]) -> int:
        before = engine.statistics()
        engine.decode(tokens)
        after = engine.statistics()
        experts.append(engine.expert_statistics())
        streamed.append(after.streamed_bytes - before.streamed_bytes)
        waited.append(after.wait_seconds - before.wait_seconds)
        return engine.sample(sampler)

    def read_alone() -> None:
        before = time.perf_counter()
        if meter is not None:
            rates.append(meter.read(METER_BYTES))
        elif streaming:
            num_bytes = engine.read_pass()
            rates.append(num_bytes / (time.perf_counter() - before))

    prompt = engine.model.tokenize(PROMPT, True, True)
    result = _decode_loop(step, prompt, num_tokens, started, read_alone, warmup)
    if meter is not None:
        meter.close()
        result.update(expert_numbers(experts[warmup], experts[-1], len(pools.layers)))
    counted = slice(1 + warmup, None)
    return {
        **result,
        "streamed_bytes_per_token": statistics.mean(streamed[counted]),
        "disk_wait_fraction": statistics.median(waited[counted]) / result["median_token_seconds"],
        "read_alone_bytes_per_second": statistics.median(rates) if rates else None,
    }


def expert_numbers(before: dict, after: dict, num_layers: int) -> dict:
    """Shares out of two readings of the engine's counters. Recall counts the experts of all layers but the first, which
    nothing predicts, also where prediction had switched itself off.
    """
    change = {name: after[name] - before[name] for name in after}
    can_be_predicted = change["wanted"] * (num_layers - 1) / num_layers
    return {
        "experts_wanted": change["wanted"],
        "hit_rate": _share(change["hits"], change["wanted"]),
        "on_the_way": _share(change["guess_hits"], change["wanted"]),
        "recall": _share(change["predicted_right"], can_be_predicted),
        "precision": _share(change["predicted_right"], change["predicted"]),
        "reads_ahead_used": _share(change["guesses_used"], change["guesses"]),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _plan_numbers(engine) -> dict:
    from edgeinfer.modelfile import read_model_file

    plan = engine.plan
    file = read_model_file(engine.model.path)
    sizes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    return {
        "expert_cache": _cache_numbers(plan.pools) if plan.pools else None,
        "mode": engine.mode,
        "budget_bytes": plan.budget_bytes,
        "overhead_bytes": plan.overhead_bytes,
        "resident_bytes": plan.ledger.entries.get("resident_weights", 0),
        "ring_bytes": plan.ring_bytes,
        "planned_streamed_bytes": sum(sizes[name] for name in plan.streamed),
        "pass_weight_bytes": sum(sizes[name] for name in plan.resident | plan.streamed),
    }


def _cache_numbers(pools) -> dict:
    return {
        "policy": pools.policy,
        "predict": pools.predict,
        "slots": sum(pools.slots),
        "experts": len(pools.layers) * pools.num_experts,
        "bytes": pools.nbytes,
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

        result = _decode_loop(step, model.tokenize(PROMPT, True, True), args.tokens, started, warmup=args.warmup)
    return {"load_seconds": load_seconds, **result}


def stock_result(args: argparse.Namespace) -> dict:
    from benchmarks.stock import StockModel

    started = time.perf_counter()
    model = StockModel(args.model, context_length=args.ctx, threads=args.threads, repack=args.repack)
    load_seconds = time.perf_counter() - started
    result = _decode_loop(model.decode, model.tokenize(PROMPT), args.tokens, started, warmup=args.warmup)
    model.close()
    return {"load_seconds": load_seconds, "repack": args.repack, **result}


def _decode_loop(
    step: Callable,
    prompt: list[int],
    count: int,
    started: float,
    between: Callable[[], None] = lambda: None,
    warmup: int = 0,
) -> dict:
    """The first token, `warmup` more that are not counted, then `count` more, each timed; `between` runs before each
    of these.
    """
    tokens = [step(prompt)]
    first_token_seconds = time.perf_counter() - started
    for _ in range(warmup):
        tokens.append(step(tokens[-1:]))
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
    parser.add_argument("--warmup", type=int, default=0, help="tokens between the first one and those that count")
    parser.add_argument("--policy", help="of the cache of experts, instead of the default one (edgeinfer)")
    parser.add_argument("--no-predict", action="store_true", help="no experts are read ahead (edgeinfer)")
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
