"""Preparing a model for this processor: optimized as a whole, cut into stages, each stage's weights
rearranged.

It runs in a process of its own (`python -m edgeinfer.onnx.prepare`, see preparing.py), which holds one stage
at a time.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort

from edgeinfer import errors
from edgeinfer.onnx.aligned_data import align_data
from edgeinfer.onnx.cut import Graph, choose_cuts, even_cuts
from edgeinfer.onnx.graph import OnnxFile, read_onnx
from edgeinfer.onnx.homes import give_back_memory
from edgeinfer.onnx.optimize import as_it_is, optimize, take_in, weight_bytes, without_weights
from edgeinfer.onnx.prepared import PortFacts, Prepared
from edgeinfer.onnx.runtime import explained, make_session
from edgeinfer.onnx.stage_files import StageFiles, open_stage, page_ranges, write_stage
from edgeinfer.onnx.tables import put_back, set_aside
from edgeinfer.onnx.weight_uses import WeightUses, mapped_ranges

Progress = Callable[[float], None]

_OPTIMIZED = f"edgeinfer-{secrets.token_hex(8)}.onnx"  # no file that a model refers to has its name
_PIECEWISE = (
    "Its stages were optimized one by one, as optimizing the whole graph takes more memory than there is: "
    "its outputs "
    "may differ in the last digits from those of one session"
)


def prepare(
    path: Path,
    folder: Path,
    stage_bytes: int,
    progress: Progress = lambda _: None,
    num_cuts: int | None = None,
    piecewise: bool = False,
) -> None:
    """Prepare the model at `path` into the empty `folder`.

    `stage_bytes`: about the weights of a stage; `num_cuts`: cuts that are made instead, evenly, None for
    none. `piecewise`: optimize each stage by itself. Raises ModelFileError, EngineError, OSError.
    """
    file = read_onnx(path)
    model = as_it_is(file, folder) if piecewise else optimize(file, folder / _OPTIMIZED)
    progress(0.1)
    graph = Graph(model)
    sizes = {name: weight_bytes(tensor) for name, tensor in graph.weights.items()}
    cuts = choose_cuts(graph, sizes, stage_bytes) if num_cuts is None else even_cuts(graph, num_cuts)
    stages = graph.stages(cuts)
    written = []
    for number, stage in enumerate(stages):
        files = StageFiles(f"stage-{number:03}.onnx", f"stage-{number:03}.data", stage.inputs, stage.outputs)
        written.append(_write(graph.stage_model(stage), folder, files, file.path, piecewise))
        progress(0.1 + 0.9 * (number + 1) / len(stages))
    (folder / _OPTIMIZED).unlink(missing_ok=True)
    reason = (
        _PIECEWISE
        if piecewise
        else ""
        if len(stages) > 1
        else _single_reason(graph, sum(sizes.values()), stage_bytes)
    )
    Prepared(tuple(written), *_ports(file), reason).write(folder)


def _write(
    model: onnx.ModelProto, folder: Path, files: StageFiles, source: Path, optimize_it: bool
) -> StageFiles:
    """Write a stage, then open it as it will be opened, to note what of its data its session maps."""
    take_in(model, folder / _OPTIMIZED)
    tables = set_aside(model.graph)
    with explained(source):
        write_stage(model.SerializeToString(), folder, files, source.parent, optimize_it)
        align_data(folder / files.model, folder / files.data)
        put_back(tables, source.parent, folder / files.model, folder / files.data)
        give_back_memory()
        written = onnx.load(folder / files.model, load_external_data=False)
        _, found = open_stage(folder, files, 1, mapped_ranges(written))
    ranges = page_ranges(found)
    give_back_memory()
    data_bytes = _leave_page_cache(folder / files.data) if (folder / files.data).exists() else 0
    uses = WeightUses(written, ranges)
    return replace(
        files,
        ranges=ranges,
        idle=uses.idle(),
        tables=uses.tables(),
        model_bytes=(folder / files.model).stat().st_size,
        data_bytes=data_bytes,
    )


def _single_reason(graph: Graph, weights: int, stage_bytes: int) -> str:
    if weights <= stage_bytes:
        why = "its weights are small"
    elif not graph.places():
        why = "its graph has no narrow place to cut: all hand over many tensors, or what is no tensor"
    else:
        why = "most of its weights belong to one operator, or lie inside a branch or a loop"
    return f"The model runs in one stage: {why}"


def _ports(file: OnnxFile) -> tuple[tuple[PortFacts, ...], tuple[PortFacts, ...]]:
    """What the whole model takes and gives, in ONNX Runtime's words."""
    options = without_weights(file.path.parent)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with explained(file.path, errors.ModelFileError):  # names may be no text
        session = make_session(file.skeleton, options)
        inputs, outputs = (
            tuple((port.name, port.type, tuple(port.shape)) for port in ports)
            for ports in (session.get_inputs(), session.get_outputs())
        )
    return inputs, outputs


def _leave_page_cache(path: Path) -> int:
    """Write the file out, so that memory is not full of it; gives its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def main() -> int:
    """Prepare as the JSON in the first argument says, and say how it goes, a line of JSON at a time."""
    path, folder, stage_bytes, piecewise = json.loads(sys.argv[1])

    def say(**what: object) -> None:
        print(json.dumps(what), flush=True)

    try:
        prepare(Path(path), Path(folder), stage_bytes, lambda done: say(progress=done), piecewise=piecewise)
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
