"""Measure edgeinfer against stock llama.cpp, in memory cgroups smaller than the model. Needs root.

    python -m benchmarks.run [--quick] [--model PATH] [--only NAME] [--json FILE]

The method is described in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import llama_cpp
import psutil

from benchmarks.cgroup import CgroupError, check_writable, drop_page_cache
from benchmarks.measure import ChildError, Measurements, Settings
from benchmarks.report import report
from edgeinfer.errors import EdgeInferError
from edgeinfer.system import default_threads

PARTS = ("streaming", "prefill", "in_memory")  # methods of Measurements
MODEL_SIZE = 3_300_000_000
BUSY_PERCENT = 10


def make_dense(work: Path) -> Path:
    """The dense Q4_0 model of about 3.3 GB, made by the first call."""
    from benchmarks.maker import make_model

    path = work / "dense-q4_0.gguf"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < MODEL_SIZE * 1.1:
        raise SystemExit(
            f"make bench: the model needs {MODEL_SIZE / 1e9:.1f} GB in {work}, which has {free / 1e9:.1f} GB "
            "free. Give another folder with --work, or a model of your own with --model."
        )
    _say(f"making a model of {MODEL_SIZE / 1e9:.1f} GB in {work}, once")
    return make_model(path, "llama", "Q4_0", size=MODEL_SIZE)


def describe_machine() -> dict:
    """What the numbers depend on. A second passes, to see who is busy."""
    others = [process for process in psutil.process_iter(["name"]) if process.pid != os.getpid()]
    for process in others:
        _percent(process)
    time.sleep(1)
    percents = {f"{process.info['name']} ({process.pid})": _percent(process) for process in others}
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "llama_cpp": llama_cpp.__version__,
        "load_average": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "busy": {name: percent for name, percent in percents.items() if percent},
    }


def _percent(process: psutil.Process) -> float:
    """Of one processor since the last call; 0 below BUSY_PERCENT."""
    try:
        percent = process.cpu_percent()
    except psutil.Error:
        return 0.0
    return percent if percent >= BUSY_PERCENT else 0.0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def gather(measurements: Measurements, parts: Sequence[str], results: dict) -> bool:
    """Measure `parts` into `results`, one after the other. False where one failed; the others go on."""
    good = True
    for part in parts:
        try:
            results[part] = getattr(measurements, part)()
        except (ChildError, CgroupError, EdgeInferError, ValueError) as error:
            _say(f"make bench: {part}: {error}")
            good = False
    return good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="measure with this GGUF file instead of a made one")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the made model is kept")
    parts = [part.replace("_", "-") for part in PARTS]
    parser.add_argument("--only", choices=parts, help="measure only this")
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens and one round: a look, not a result"
    )
    parser.add_argument("--threads", type=int, default=default_threads(), help="computing threads of both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cgroup and child are cleaned up
    try:
        check_writable()
    except CgroupError as error:
        _say(
            "make bench: no memory cgroup can be made here, so nothing can be compared under a limit "
            f"({error}). Run it as root, or where the cgroup of this shell is writable."
        )
        return 1
    settings = Settings.quick(args.threads) if args.quick else Settings(args.threads)
    machine = describe_machine()
    _say(f"load average {machine['load_average']}")
    if machine["busy"]:
        names = ", ".join(f"{name} {percent:.0f} %" for name, percent in machine["busy"].items())
        _say(f"WARNING: other processes are busy, the numbers will be too low or noisy: {names}")
    results = {"machine": machine, "settings": asdict(settings)}
    try:
        measurements = Measurements(args.model or make_dense(args.work), settings)
    except (EdgeInferError, OSError) as error:
        _say(f"make bench: {error}")
        return 1
    results["model"] = {"name": measurements.model.name, "weights_bytes": measurements.weights_bytes}
    if not drop_page_cache():
        _say("the page cache can only be dropped for the model's file: run as root to drop all of it")
    good = gather(measurements, [args.only.replace("-", "_")] if args.only else PARTS, results)
    results["others_cpu"] = measurements.noise
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0 if good else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
