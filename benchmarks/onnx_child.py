"""The ONNX process under test: opens a model, runs it, prints one JSON line.

python -m benchmarks.onnx_child edgeinfer MODEL --memory BYTES --batch 1
python -m benchmarks.onnx_child stock MODEL --batch 32
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.child import major_faults, peak_memory_bytes

SEQUENCE = 16  # tokens


def feeds(batch: int) -> dict[str, np.ndarray]:
    tokens = np.arange(batch * SEQUENCE, dtype=np.int64) * 7 % 1000
    return {"tokens": tokens.reshape(batch, SEQUENCE)}


def edgeinfer_result(args: argparse.Namespace) -> dict:
    from edgeinfer.engines.onnx import open_onnx

    started = time.perf_counter()
    rates: list[float] = []
    with open_onnx(args.model, memory=args.memory, threads=args.threads) as model:
        load_seconds = time.perf_counter() - started

        def read_alone() -> None:
            """The disk, measured in the same minute, by reading what a pass streams."""
            before = time.perf_counter()
            num_bytes = model.read_pass()
            if num_bytes:
                rates.append(num_bytes / (time.perf_counter() - before))

        before_all = model.statistics()
        result = _passes(lambda: model.run(feeds(args.batch)), args.passes, started, read_alone)
        plan, now = model.plan, model.statistics()
        entries = plan.ledger.entries
        return {
            **result,
            "load_seconds": load_seconds,
            "mode": plan.mode,
            "num_stages": plan.num_stages,
            "budget_bytes": plan.budget_bytes,
            "overhead_bytes": plan.overhead_bytes,
            "activation_bytes": entries.get("activations", 0),
            "resident_bytes": entries.get("resident_weights", 0),
            "ring_bytes": plan.ring_bytes,
            "streamed_bytes": getattr(plan, "streamed_bytes", 0),
            "read_alone_bytes_per_second": statistics.median(rates) if rates else None,
            "waited_seconds": now.wait_seconds - before_all.wait_seconds,
            "peak_memory_bytes": now.peak_memory_bytes,
        }


def stock_result(args: argparse.Namespace) -> dict:
    import onnxruntime as ort

    started = time.perf_counter()
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    load_seconds = time.perf_counter() - started
    result = _passes(lambda: dict(zip(names, session.run(names, feeds(args.batch)))), args.passes, started)
    return {**result, "load_seconds": load_seconds, "peak_memory_bytes": peak_memory_bytes()}


def _passes(
    run: Callable[[], dict[str, np.ndarray]],
    count: int,
    started: float,
    between: Callable[[], None] = lambda: None,
) -> dict:
    """The first pass, a second one that settles what stays in memory, then `count` that are timed."""
    first = _digest(run())
    first_seconds = time.perf_counter() - started
    run()
    faults, seconds = major_faults(), []
    for _ in range(count):
        between()
        before = time.perf_counter()
        outputs = run()
        seconds.append(time.perf_counter() - before)
    return {
        "first_output_seconds": first_seconds,
        "pass_seconds": seconds,
        "median_pass_seconds": statistics.median(seconds),
        "passes_per_second": 1 / statistics.median(seconds),
        "major_faults_per_pass": (major_faults() - faults) / count,
        "digest": first if first == _digest(outputs) else "outputs differ from pass to pass",
    }


def _digest(outputs: dict[str, np.ndarray]) -> str:
    """Of the outputs' bytes, which are not kept: they would count as memory of the engine under test."""
    digest = hashlib.sha256()
    for name in sorted(outputs):
        digest.update(np.ascontiguousarray(outputs[name]))
    return digest.hexdigest()


ENGINES = {"edgeinfer": edgeinfer_result, "stock": stock_result}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_child", description=__doc__.splitlines()[0]
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--memory", type=int, help="budget in bytes (edgeinfer)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    print(json.dumps({"engine": args.engine, **ENGINES[args.engine](args)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
