"""Measure edgeinfer against stock llama.cpp, in memory cgroups smaller than the model. Needs root.

    python -m benchmarks.run [--quick] [--model PATH] [--moe-model PATH] [--only NAME] [--json FILE]

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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import llama_cpp
import psutil

from benchmarks.cgroup import CgroupError, check_writable, drop_page_cache
from benchmarks.experts import measure_experts
from benchmarks.measure import ChildError, Measurements, Settings
from benchmarks.report import report
from edgeinfer.errors import EdgeInferError
from edgeinfer.system import default_threads

DENSE_PARTS = ("streaming", "prefill", "in_memory")  # methods of Measurements
PARTS = (*DENSE_PARTS, "experts", "onnx")
BUSY_PERCENT = 10

_EXPERTS = {"layers": 24, "embedding": 2048, "ffn": 736, "experts": 64, "experts_used": 8, "alignment": 4096}
_MANY = {**_EXPERTS, "layers": 36, "embedding": 1024, "ffn": 192, "experts": 256}
MODELS = {  # name: (architecture, options of benchmarks.maker.plan_model)
    "dense": ("llama", {"size": 3_300_000_000}),
    "predictable": ("mixtral", {**_EXPERTS, "routing": "predictable"}),
    "unpredictable": ("mixtral", {**_EXPERTS, "routing": "unpredictable"}),
    "small": ("mixtral", {**_MANY, "routing": "predictable"}),
}
ENCODERS = {  # name: (bytes of weights, options of benchmarks.onnx_maker.Encoder)
    "float32": (2_000_000_000, {}),
    "4-bit": (1_000_000_000, {"width": 2048, "ffn": 8192, "bits": 4}),
}


def make_once(name: str, work: Path) -> Path:
    """The Q4_0 model of MODELS, made by the first call."""
    from benchmarks.maker import plan_model, write_model

    path = work / f"{name}-q4_0.gguf"
    if path.exists():
        return path
    arch, options = MODELS[name]
    recipe = plan_model(arch, "Q4_0", **options)
    size = sum(tensor.nbytes for tensor in recipe.tensors)
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < size * 1.1:
        raise SystemExit(
            f"make bench: the {name} model needs {size / 1e9:.1f} GB in {work}, which has {free / 1e9:.1f} GB "
            "free. Give another folder with --work, or a model of your own with --model or --moe-model."
        )
    _say(f"making the {name} model of {size / 1e9:.1f} GB in {work}, once")
    return write_model(path, recipe)


def make_encoder_once(name: str, work: Path) -> Path:
    """The encoder of ENCODERS, made by the first call."""
    from benchmarks.onnx_maker import Encoder, make_encoder

    path = work / f"{name}.onnx"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        size, options = ENCODERS[name]
        _say(f"making the {name} encoder of {size / 1e9:.1f} GB in {work}, once; it is prepared there too")
        make_encoder(path, Encoder.of_size(size, **options))
    return path


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


def gather(measure: dict[str, Callable[[], dict]], results: dict) -> bool:
    """Measure each part into `results`, one after the other. False where one failed; the others go on."""
    good = True
    for part, function in measure.items():
        try:
            results[part] = function()
        except (ChildError, CgroupError, EdgeInferError, ValueError) as error:
            _say(f"make bench: {part}: {error}")
            good = False
    return good


def measure_parts(parts: Sequence[str], args: argparse.Namespace, settings: Settings, results: dict) -> bool:
    """All of `parts` into `results`, with the model that each needs; False where one failed."""
    dense = [part for part in parts if part in DENSE_PARTS]
    good, noise = True, 0.0
    if dense:
        measurements = Measurements(args.model or make_once("dense", args.work), settings)
        results["model"] = {"name": measurements.model.name, "weights_bytes": measurements.weights_bytes}
        good = gather({part: getattr(measurements, part) for part in dense}, results)
        noise = measurements.noise
    if "experts" in parts:
        results["experts"] = {}
        good &= gather(_expert_parts(args, settings), results["experts"])
        noise = max([noise, *(model["noise"] for model in results["experts"].values())])
    if "onnx" in parts:
        results["onnx"] = {}
        good &= gather(_onnx_parts(args, settings), results["onnx"])
        noise = max([noise, *(model["noise"] for model in results["onnx"].values())])
    results["others_cpu"] = noise
    return good


def _onnx_parts(args: argparse.Namespace, settings: Settings) -> dict[str, Callable[[], dict]]:
    from benchmarks.onnx import OnnxMeasurements

    def measure(name: str) -> dict:
        return OnnxMeasurements(make_encoder_once(name, args.work), settings, args.work / "cache").measure()

    return {name: partial(measure, name) for name in ENCODERS}


def _expert_parts(args: argparse.Namespace, settings: Settings) -> dict[str, Callable[[], dict]]:
    """How each mixture of experts is measured; only one of them is compared with stock llama.cpp, which is slow."""
    if args.moe_model:
        return {"given": lambda: measure_experts(args.moe_model, settings, compare=True)}

    def measure(name: str) -> dict:
        return measure_experts(make_once(name, args.work), settings, compare=name == "predictable")

    return {name: partial(measure, name) for name in ("predictable", "unpredictable", "small")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="measure with this GGUF file instead of a made one")
    parser.add_argument("--moe-model", type=Path, help="measure with this mixture of experts instead of made ones")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where made models are kept")
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
    if not drop_page_cache():
        _say("the page cache can only be dropped for the model's file: run as root to drop all of it")
    try:
        good = measure_parts([args.only.replace("-", "_")] if args.only else PARTS, args, settings, results)
    except (EdgeInferError, OSError) as error:
        _say(f"make bench: {error}")
        return 1
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0 if good else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
