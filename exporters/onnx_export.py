"""ONNX models, PyTorch modules and checkpoints as ONNX files that stream well: simplified, quantized, laid
out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from edgeinfer.errors import ExportError, ModelFileError
from edgeinfer.exporters.checkpoint import read_config
from edgeinfer.exporters.onnx_float16 import to_float16
from edgeinfer.exporters.onnx_graph import fix_default_inputs, standard_opset
from edgeinfer.exporters.onnx_optimize import can_optimize, optimize
from edgeinfer.exporters.onnx_quantize import INT8_OPSET, quantize_int4, quantize_int8
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_source import OnnxGraph, open_onnx
from edgeinfer.exporters.onnx_static import FORMS as STATIC_FORMS
from edgeinfer.exporters.onnx_static import OPSET as STATIC_OPSET
from edgeinfer.exporters.onnx_static import quantize_static
from edgeinfer.exporters.onnx_tokenizer import FILES as TOKENIZER_FILES
from edgeinfer.exporters.onnx_tokenizer import copy_tokenizer
from edgeinfer.exporters.onnx_write import DATA_SUFFIX, Written, check_written, write_onnx
from edgeinfer.exporters.output import TargetGroup
from edgeinfer.onnx.nested import all_graphs

if TYPE_CHECKING:
    import torch

Progress = Callable[[float], None]

#: What --quant may say, and what it means.
QUANTS = {
    "F32": "as it is",
    "F16": "float16 inside, float32 outside",
    "INT8": "matrix products, embeddings and LSTMs in 8 bits, activations quantized as they come",
    "INT8_STATIC": "convolutions and matrix products in 8 bits, with ranges from calibration data",
    "INT8_TENSORRT": "the same with symmetric ranges, as TensorRT wants them",
    "INT4": "weights of matrix products in 4 bits",
}
#: Other names that people know them by.
_ALIASES = {
    "FLOAT32": "F32",
    "FP32": "F32",
    "FLOAT16": "F16",
    "FP16": "F16",
    "INT8_DYNAMIC": "INT8",
    "MATMULNBITS": "INT4",
}
_KINDS_OF_NUMBERS = {
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.STRING,
}


@dataclass(frozen=True)
class OnnxReport:
    """What was exported. `bytes`: of all of `files`; `parameters`: elements of weights before quantization;
    `quantized`: operators that were changed; `notes`: what differs from the original, and when.
    """

    architecture: str
    type: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float
    files: tuple[str, ...]
    quantized: int
    notes: tuple[str, ...]


def export_onnx(
    source: str | Path | torch.nn.Module,
    target: str | Path,
    *,
    quant: str | None = None,
    calibration: str | Path | None = None,
    example_inputs: Any = None,
    force: bool = False,
    check: Callable[[Path], object] | None = None,
    progress: Progress | None = None,
) -> OnnxReport:
    """Write `source` as ONNX to `target`, its weights to the same name with ".data", a tokenizer's files
    beside it.

    `source`: an ONNX file, a PyTorch module (with `example_inputs`, see torch_export), or a checkpoint
    folder: a decoder (onnx_decoder) or an encoder. `quant`: one of QUANTS, None for the source's own.
    `calibration`: see onnx_calibration. `check` is called with the finished file before it is put in place.
    All files appear, or none. Memory: float32, F16 and INT4 hold one weight at a time; INT8 of an ONNX file
    one weight and its copies; INT8_STATIC, and PyTorch while it exports, the whole model. Raises ExportError,
    ModelFileError.
    """
    started = time.monotonic()
    target = Path(target)
    quant = _check_quant(quant, calibration)
    source = Path(source) if isinstance(source, str) else source
    companions = TOKENIZER_FILES if isinstance(source, Path) and source.is_dir() else ()
    group = TargetGroup(target, force, replaced=[target.name + DATA_SUFFIX], others=companions)
    with group as folder, _Job(source, folder, quant, calibration, example_inputs, progress) as job:
        written = _written(job, folder / target.name)
        if companions:
            job.notes += copy_tokenizer(source, folder)
        if check is not None:
            check(folder / target.name)
        names = (target.name, target.name + DATA_SUFFIX, *companions)
        files = tuple(name for name in names if (folder / name).exists())
        report = _report(job, written, files, started)
    return report


def _written(job: _Job, path: Path) -> Written:
    try:
        job.make()
        written = write_onnx(job.graph, path, job.part(0.6, 1.0))
    except UnicodeDecodeError as error:  # protobuf looks at a text only when it is used
        raise ModelFileError(
            f"{job.name} is not an ONNX model, or is damaged: a name in it is not text ({error.reason} "
            f"{error.object[error.start]:#x}). Download it again."
        ) from error
    check_written(path, job.name)
    return written


def find_quant(name: str) -> str:
    """A key of QUANTS, however it is written; a name that is not known as it is."""
    plain = name.upper().replace("-", "_")
    return _ALIASES.get(plain, plain)


def _check_quant(quant: str | None, calibration: str | Path | None) -> str | None:
    known = find_quant(quant) if quant is not None else None
    if known is not None and known not in QUANTS:
        raise ExportError(f"--quant {quant} is not for ONNX. Expected one of {', '.join(QUANTS)}.")
    if known in STATIC_FORMS and calibration is None:
        raise ExportError(
            f"--quant {known} needs --calibration: a .npz or .npy file, or a folder of them, with inputs "
            "such as the model will meet."
        )
    if calibration is not None and known not in STATIC_FORMS:
        raise ExportError(
            f"--calibration is for --quant {' and '.join(STATIC_FORMS)}. Leave it out, or give one of them."
        )
    return known


def _report(job: _Job, written: Written, files: tuple[str, ...], started: float) -> OnnxReport:
    return OnnxReport(
        architecture=job.architecture,
        type=job.quant or "as it was",
        tensors=job.tensors,
        parameters=job.parameters,
        bytes=written.model_bytes + written.data_bytes,
        seconds=time.monotonic() - started,
        files=files,
        quantized=job.quantized,
        notes=tuple(job.notes),
    )


class _Job:
    """One export on its way: `make` leaves the graph to write in `graph`."""

    graph: OnnxGraph

    def __init__(
        self,
        source: Any,
        folder: Path,
        quant: str | None,
        calibration: str | Path | None,
        example_inputs: Any,
        progress: Progress | None,
    ):
        self._source = source
        self._work = folder / ".work"
        self._calibration = calibration
        self._example_inputs = example_inputs
        self._progress = progress
        self.quant = quant
        self.name = source if isinstance(source, Path) else type(source).__name__
        self.architecture = "ONNX graph"
        self.tensors = self.parameters = self.quantized = 0
        self.notes: list[str] = []

    def __enter__(self) -> _Job:
        self._work.mkdir()
        self._scratch = Scratch(self._work / "made.weights")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._scratch.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def part(self, start: float, stop: float) -> Progress | None:
        """Progress of a part of the work, as progress of all of it."""
        if self._progress is None:
            return None
        return lambda share: self._progress(start + (stop - start) * share)

    def make(self) -> None:
        if isinstance(self._source, Path) and self._source.is_dir():
            self._from_checkpoint()
        elif isinstance(self._source, Path):
            self._from_onnx(self._source)
        else:
            from edgeinfer.exporters.torch_export import export_module

            traced = self._work / "traced.onnx"
            export_module(self._source, self._example_inputs, traced)
            self._from_onnx(traced)
            self.architecture = self.name

    def _from_checkpoint(self) -> None:
        from edgeinfer.exporters.onnx_decoder import build_decoder, is_decoder

        if is_decoder(read_config(self._source)):
            decoder = build_decoder(self._source, self.quant or "F32", self._scratch, self.part(0.0, 0.6))
            self.graph, self.architecture = decoder.graph, decoder.architecture
            self.quantized = decoder.quantized
            self.notes += decoder.notes
            self._count()
            self.parameters = decoder.parameters
            return
        from edgeinfer.exporters.torch_export import export_encoder

        traced = self._work / "traced.onnx"
        architecture = export_encoder(self._source, traced)
        self._from_onnx(traced)
        self.architecture = architecture

    def _from_onnx(self, path: Path) -> None:
        self.graph = open_onnx(path)
        fix_default_inputs(self.graph.proto)
        self._count()
        self._raise_opset()
        if can_optimize(self.graph.proto):
            self.graph = optimize(self.graph, path, self._work)
        else:
            self.notes.append(
                "the graph is not simplified: it computes in 16 bits, and the optimizer would undo that"
            )
        self._quantize()

    def _count(self) -> None:
        tensors = [tensor for graph in all_graphs(self.graph.proto.graph) for tensor in graph.initializer]
        weights = [tensor for tensor in tensors if tensor.data_type not in _KINDS_OF_NUMBERS]
        self.tensors = len(tensors)
        self.parameters = sum(prod(tensor.dims) for tensor in weights)

    def _raise_opset(self) -> None:
        """Some operators that quantizing needs are only in newer versions."""
        model = self.graph.proto
        needed = STATIC_OPSET if self.quant in STATIC_FORMS else INT8_OPSET if self.quant == "INT8" else 0
        if standard_opset(model) >= needed:
            return
        try:
            self.graph.proto = onnx.version_converter.convert_version(model, needed)
            self.graph.proto.ir_version = max(7, model.ir_version)
        except RuntimeError as error:  # of the converter, where an operator has no newer version
            raise ExportError(
                f"{self.name}: is written for operators of version {standard_opset(model)}, --quant "
                f"{self.quant} needs {needed}, and onnx cannot convert it: "
                f"{' '.join(str(error).split())[:200]}. Export it anew from where it comes from."
            ) from error

    def _quantize(self) -> None:
        between = self.part(0.1, 0.6)
        if self.quant == "F16":
            if not to_float16(self.graph):
                self.notes.append("nothing became float16: no weight is float32 and used where float16 may be")
        elif self.quant == "INT8":
            self.quantized = quantize_int8(self.graph, self._scratch, between)
            self._note_convolutions()
        elif self.quant == "INT4":
            self.quantized = quantize_int4(self.graph, self._scratch, between)
        elif self.quant in STATIC_FORMS:
            self.graph, self.quantized = quantize_static(
                self.graph, STATIC_FORMS[self.quant], Path(self._calibration), self._work, self.name
            )

    def _note_convolutions(self) -> None:
        nodes = [node for graph in all_graphs(self.graph.proto.graph) for node in graph.node]
        count = sum(node.op_type in ("Conv", "ConvTranspose") for node in nodes)
        if count:
            self.notes.append(
                f"{count:,} convolutions stay in float32: they need --quant INT8_STATIC and --calibration"
            )
