"""Preparing a model for this processor: optimized as a whole, cut into stages, each stage's weights rearranged.

It runs in a process of its own (`python -m edgeinfer.onnx.prepare`), which holds one stage at a time and whose memory is
gone when it ends; `run_in_child` starts it and passes on what it says, a line of JSON at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgeinfer import errors
from edgeinfer.onnx.cache import MANIFEST
from edgeinfer.onnx.homes import give_back_memory
from edgeinfer.onnx.stage_files import StageFiles

Progress = Callable[[float], None]

FORMAT = 3  # of what is written; another number is another entry of the cache
_FEW_STAGES, _MANY_STAGES = 24, 96
_SMALL_STAGE_BYTES, _LARGE_STAGE_BYTES = 2 << 20, 32 << 20
_OPTIMIZED = "edgeinfer-optimized.onnx"


@dataclass(frozen=True)
class Prepared:
    """What a manifest says: the stages in order, and the model's own inputs, outputs and metadata.

    `inputs`, `outputs`: (name, ONNX Runtime's word for the type, shape). `single_reason`: why there is one stage only.
    """

    stages: tuple[StageFiles, ...]
    inputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]
    single_reason: str

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        values = json.loads((folder / MANIFEST).read_text())
        inputs, outputs = (
            tuple((name, kind, tuple(shape)) for name, kind, shape in values[key])
            for key in ("inputs", "outputs")
        )
        return cls(
            tuple(map(StageFiles.from_json, values["stages"])), inputs, outputs, str(values["single_reason"])
        )


def default_stage_bytes(weights_bytes: int) -> int:
    """Small stages need a small ring, but each one costs a session and a little time."""
    few = min(_LARGE_STAGE_BYTES, max(_SMALL_STAGE_BYTES, weights_bytes // _FEW_STAGES))
    return max(few, weights_bytes // _MANY_STAGES)


def prepare(path: Path, folder: Path, cuts_wanted: int | None, stage_bytes: int, progress: Progress) -> None:
    """Prepare the model at `path` into the empty `folder`.

    `stage_bytes`: about the weights of a stage; `cuts_wanted`: cuts that are made whatever that says, None for none.
    Raises ModelFileError, EngineError.
    """
    from edgeinfer.onnx.cut import Graph, choose_cuts, even_cuts
    from edgeinfer.onnx.graph import read_onnx
    from edgeinfer.onnx.optimize import optimize, weight_bytes

    file = read_onnx(path)
    model = optimize(file, folder / _OPTIMIZED)
    progress(0.1)
    graph = Graph(model)
    sizes = {name: weight_bytes(tensor) for name, tensor in graph.weights.items()}
    cuts = choose_cuts(graph, sizes, stage_bytes) if cuts_wanted is None else even_cuts(graph, cuts_wanted)
    stages = graph.stages(cuts)
    written = []
    for number, stage in enumerate(stages):
        files = StageFiles(f"stage-{number:03}.onnx", f"stage-{number:03}.data", stage.inputs, stage.outputs)
        written.append(_write(graph.stage_model(stage), folder, files, file.path))
        progress(0.1 + 0.9 * (number + 1) / len(stages))
    (folder / _OPTIMIZED).unlink()
    manifest = {
        "stages": [files.as_json() for files in written],
        "single_reason": "" if len(stages) > 1 else _single_reason(graph, sum(sizes.values()), stage_bytes),
        **_ports(file),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _write(model, folder: Path, files: StageFiles, source: Path) -> StageFiles:
    """Write a stage, then open it as it will be opened, to note what of its data its session maps."""
    import onnx

    from edgeinfer.onnx.optimize import take_in
    from edgeinfer.onnx.runtime import explained
    from edgeinfer.onnx.stage_files import open_stage, page_ranges, write_stage
    from edgeinfer.onnx.weight_uses import WeightUses

    take_in(model, folder / _OPTIMIZED)
    with explained(source):
        write_stage(model.SerializeToString(), folder, files, source.parent)
        give_back_memory()
        _, found = open_stage(folder, files, 1)
    ranges = page_ranges(found)
    give_back_memory()
    data_bytes = _leave_page_cache(folder / files.data) if (folder / files.data).exists() else 0
    uses = WeightUses(onnx.load(folder / files.model, load_external_data=False), ranges)
    return replace(
        files,
        ranges=ranges,
        idle=uses.idle(),
        tables=uses.tables(),
        model_bytes=(folder / files.model).stat().st_size,
        data_bytes=data_bytes,
    )


def _single_reason(graph, weights: int, stage_bytes: int) -> str:
    if weights <= stage_bytes:
        return "its weights are small"
    if not graph.places():
        return "its graph has no narrow place to cut: each hands over too many tensors, or values that are no tensors"
    return "most of its weights belong to one operator, or lie inside a branch or a loop"


def _ports(file) -> dict:
    """From ONNX Runtime: what it takes and gives for the whole model."""
    import onnxruntime as ort

    from edgeinfer.onnx.optimize import without_weights

    options = without_weights(file.path.parent)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(file.skeleton, options, providers=["CPUExecutionProvider"])
    return {
        key: [(port.name, port.type, list(port.shape)) for port in ports]
        for key, ports in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }


def _leave_page_cache(path: Path) -> int:
    """Write the file out, so that memory is not full of it; gives its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def run_in_child(
    path: Path, folder: Path, cuts_wanted: int | None, stage_bytes: int, progress: Progress
) -> None:
    """`prepare` in a process of its own; raises what it raised."""
    request = json.dumps([os.fspath(path.absolute()), os.fspath(folder), cuts_wanted, stage_bytes])
    command = [sys.executable, "-m", "edgeinfer.onnx.prepare", request]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as child:
        try:
            said = _follow(child, progress)
            problem = child.stderr.read()
        except BaseException:
            child.kill()
            raise
    if "error" in said:
        raise getattr(errors, said["error"])(said["text"])
    if child.returncode != 0 or not said.get("done"):
        raise errors.EngineError(f"{path} could not be prepared: {_how_it_ended(child.returncode, problem)}")


def _follow(child: subprocess.Popen, progress: Progress) -> dict:
    said: dict = {}
    for line in child.stdout:
        said = json.loads(line)
        if "progress" in said:
            progress(said["progress"])
    return said


def _how_it_ended(code: int, problem: str) -> str:
    if code == -9:
        return (
            "the process that prepared it was killed, most likely for want of memory. Give a larger --memory."
        )
    lines = problem.strip().splitlines()
    return f"its process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"


def main() -> int:
    path, folder, cuts_wanted, stage_bytes = json.loads(sys.argv[1])

    def say(**what: object) -> None:
        print(json.dumps(what), flush=True)

    try:
        prepare(Path(path), Path(folder), cuts_wanted, stage_bytes, lambda fraction: say(progress=fraction))
    except errors.EdgeInferError as error:
        say(error=type(error).__name__, text=str(error))
        return 1
    except OSError as error:
        text = f"It could not be written to {folder}: {error.strerror or error}. Make room there."
        say(error="EngineError", text=f"{path} could not be prepared. {text}")
        return 1
    say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
