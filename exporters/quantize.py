"""GGUF files made smaller by llama.cpp's own quantization, in a child process; see quantize_child.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from edgeinfer.budget import format_size
from edgeinfer.engines.ggml import BLOCKS, TYPE_NUMBERS
from edgeinfer.errors import ExportError
from edgeinfer.exporters.quant_types import (
    FILE_ALIGNMENT,
    FLOAT_TYPES,
    QUANT_TYPES,
    TENSOR_TYPES,
    bits_per_weight,
    find_type,
    needs_importance,
    quantized_bytes,
    quantized_tensor,
)
from edgeinfer.exporters.quantize_child import DRY_RUN_DONE, Request
from edgeinfer.modelfile import ModelFile, TensorInfo, read_model_file
from edgeinfer.system import usable_processors

if TYPE_CHECKING:
    from edgeinfer.exporters.importance import Importance

_TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = *(\w+), (.*)")
_NEW_TYPE = re.compile(r"\((\w+)\)\s*$")
_BUFFER_BYTES, _SMALLEST_BUFFER_BYTES = 1 << 30, 4 << 20
_PROCESSES_BYTES = 120 << 20  # Python and libraries, of this process and of the child


class ImportanceNeeded(ExportError):
    """The type is noise without an importance matrix, and there is none or it does not name every tensor."""


@dataclass(frozen=True)
class QuantizeReport:
    """What became of a model. `tensors`: name -> type; `without_importance`: what was quantized without it."""

    type: str
    source_bytes: int
    target_bytes: int
    source_bits_per_weight: float
    bits_per_weight: float
    tensors: dict[str, str]
    without_importance: tuple[str, ...] | None  # None: there was no importance matrix
    seconds: float


def quantize_gguf(
    source: Path,
    target: Path,
    type: str,
    *,
    importance: Importance | None = None,
    tensor_types: Mapping[str, str] | None = None,
    threads: int | None = None,
    memory: int | None = None,
    requantize: bool = False,
    progress: Callable[[float], None] | None = None,
) -> QuantizeReport:
    """Write the GGUF model `source` (the first part, where it is split) to the one file `target` as `type`.

    `type` is a name of QUANT_TYPES; `tensor_types` (tensor -> name of TENSOR_TYPES) goes before it.
    `threads`: None for all processors. `memory`: bytes; buffers take what it leaves. `requantize`: also from
    quantized weights. Raises ExportError before anything is written where that can be known; OSError for a
    full disk, which `Target` explains; ModelFileError. Nothing is left running after an error or Ctrl-C.
    """
    started = time.perf_counter()
    file = read_model_file(source)
    request = _request(file, target, type, importance, tensor_types, threads, memory, requantize)
    planned: dict[str, str] = {}
    with _child(request, importance) as lines:
        _follow(lines, file, lambda name, kind: planned.update({name: kind}), None)
        _check_planned(file, planned, type, importance)
        _check_room(file, planned, target)
        _follow(lines, file, lambda _name, _kind: None, progress, target)
    written = _check_written(target, planned)
    return QuantizeReport(
        type=find_type(type),
        source_bytes=file.file_bytes,
        target_bytes=written.file_bytes,
        source_bits_per_weight=bits_per_weight(file),
        bits_per_weight=bits_per_weight(written),
        tensors=planned,
        without_importance=_without_importance(file, planned, importance),
        seconds=time.perf_counter() - started,
    )


def planned_types(
    source: Path,
    type: str,
    *,
    importance: Importance | None = None,
    tensor_types: Mapping[str, str] | None = None,
    requantize: bool = False,
) -> dict[str, str]:
    """Tensor -> type as `quantize_gguf` would write them; nothing is written."""
    file = read_model_file(source)
    request = _request(file, Path(os.devnull), type, importance, tensor_types, 1, None, requantize)
    request.only_dry = True
    planned: dict[str, str] = {}
    with _child(request, importance) as lines:
        _follow(lines, file, lambda name, kind: planned.update({name: kind}), None)
    _check_planned(file, planned, type, importance)
    return planned


def _request(
    file: ModelFile,
    target: Path,
    type: str,
    importance: Importance | None,
    tensor_types: Mapping[str, str] | None,
    threads: int | None,
    memory: int | None,
    requantize: bool,
) -> Request:
    name = find_type(type)
    if file.is_vocabulary_only:
        raise ExportError(
            f"{file.paths[0]} has a vocabulary only, no weights. Give a GGUF file of the whole model."
        )
    quantized = quantized_tensor(file)
    if quantized is not None and not requantize:
        raise ExportError(
            f"{file.paths[0]} is quantized already: {quantized} is {file.tensor(quantized).type}. Quantizing again adds "
            "the errors of both. Give the F32, F16 or BF16 model, or --requantize to do it all the same."
        )
    metadata: dict[str, int | str] = {}
    if "general.alignment" in file.metadata:
        metadata["general.alignment"] = FILE_ALIGNMENT
    matrices: list[tuple[str, int]] = []
    if importance is not None:
        matrices = [(name, importance.weights(name).size) for name in _entries(file, importance)]
        metadata["quantize.imatrix.file"] = importance.origin
        metadata["quantize.imatrix.entries_count"] = len(matrices)
        metadata["quantize.imatrix.chunks_count"] = importance.chunks
    return Request(
        source=os.fspath(file.paths[0]),
        target=os.fspath(target),
        ftype=QUANT_TYPES[name],
        threads=threads or usable_processors(),
        buffer_bytes=_buffer_bytes(file, memory),
        requantize=requantize,
        only_dry=False,
        types=_overrides(file, name, tensor_types or {}),
        metadata=metadata,
        importance=matrices,
    )


def _buffer_bytes(file: ModelFile, memory: int | None) -> int:
    """What llama.cpp's buffers may take: it maps a tensor at a time, beside the two processes' own memory."""
    if memory is None:
        return _BUFFER_BYTES
    largest = max((tensor.nbytes for tensor in file.tensors), default=0)
    return max(_SMALLEST_BUFFER_BYTES, min(_BUFFER_BYTES, memory - _PROCESSES_BYTES - largest))


def _overrides(file: ModelFile, type: str, tensor_types: Mapping[str, str]) -> dict[str, int]:
    if tensor_types and type in FLOAT_TYPES:
        raise ExportError(
            f"Types of single tensors are ignored where all become {type}. Give a quantized type."
        )
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    for name, kind in tensor_types.items():
        if name not in shapes:
            raise ExportError(f"{file.paths[0]} has no tensor {name!r}, for which the type {kind} was asked.")
        if kind not in TENSOR_TYPES:
            raise ExportError(
                f"{name}: the type {kind!r} is unknown. Expected one of {', '.join(TENSOR_TYPES)}."
            )
        if shapes[name][0] % BLOCKS[kind].block_size:
            raise ExportError(
                f"{name}: rows of {shapes[name][0]} elements are not a multiple of {BLOCKS[kind].block_size}, "
                f"the block size of {kind}."
            )
    return {name: TYPE_NUMBERS[kind] for name, kind in tensor_types.items()}


def _entries(file: ModelFile, importance: Importance) -> list[str]:
    """The tensors of `file` that the matrix names. Raises ExportError where it is another model's."""
    found = []
    for tensor in file.tensors:
        if tensor.name not in importance.sums:
            continue
        expected = tensor.shape[0] * prod(tensor.shape[2:])
        size = importance.sums[tensor.name].size
        if size != expected:
            raise ExportError(
                f"The importance matrix {importance.origin} has {size} values for {tensor.name}, the model needs "
                f"{expected}: it is another model's. Gather one with --calibration."
            )
        found.append(tensor.name)
    if not found:
        raise ExportError(
            f"The importance matrix {importance.origin} names none of the tensors of {file.paths[0]}: it is another "
            "model's. Gather one with --calibration."
        )
    return found


@contextmanager
def _child(request: Request, importance: Importance | None) -> Iterator[Iterator[str]]:
    """The lines of llama.cpp's log while the child works on `request`. However it went, it has ended afterwards."""
    command = [sys.executable, "-m", "edgeinfer.exporters.quantize_child"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=1 << 16
    )
    last: deque[str] = deque(maxlen=8)
    try:
        _send(child, request, importance)
        yield _log_lines(child, last)
        if child.wait() != 0:
            raise ExportError(_failure(request, child.returncode, last))
    finally:
        child.kill()
        child.wait()
        child.stderr.close()
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass


def _send(child: subprocess.Popen, request: Request, importance: Importance | None) -> None:
    try:
        child.stdin.write(json.dumps(vars(request)).encode() + b"\n")
        for name, _count in request.importance:
            child.stdin.write(np.ascontiguousarray(importance.weights(name), dtype="<f4").data.cast("B"))
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; its log says why


def _log_lines(child: subprocess.Popen, last: deque[str]) -> Iterator[str]:
    for raw in child.stderr:
        line = raw.decode("utf-8", "replace").strip()
        if line:
            last.append(line)
            yield line


def _failure(request: Request, code: int, last: deque[str]) -> str:
    how = f"was ended by signal {-code}" if code < 0 else "gave up"
    said = "; ".join(line.removeprefix("llama_model_quantize: ") for line in list(last)[-3:])
    return (
        f"llama.cpp {how} while quantizing {request.source}: {said or 'it gave no reason'}. If the model is whole, "
        f"llama-cpp-python {llama_cpp.__version__} may not support it: update it, or give another type."
    )


def _follow(
    lines: Iterator[str],
    file: ModelFile,
    found: Callable[[str, str], object],
    progress: Callable[[float], None] | None,
    target: Path | None = None,
) -> None:
    """Read the log of one run, dry or not: `found(tensor, new type)` for each, and the share that is done."""
    sizes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    total, done = max(1, sum(sizes.values())), 0
    for line in lines:
        if line == DRY_RUN_DONE:
            return
        if "failed to quantize" in line and target is not None:
            _raise_if_disk_is_full(target)
        match = _TENSOR_LINE.match(line)
        if match is None or match[1] not in sizes:
            continue
        new = _NEW_TYPE.search(match[3])
        found(match[1], (new[1] if new else match[2]).upper())
        done += sizes[match[1]]
        if progress is not None:
            progress(done / total)


def _check_planned(
    file: ModelFile, planned: dict[str, str], type: str, importance: Importance | None
) -> None:
    unplanned = [tensor.name for tensor in file.tensors if tensor.name not in planned]
    if unplanned:
        return  # the child failed, and its log says why
    mixture = find_type(type)
    for name, kind in planned.items():
        if not needs_importance(name, kind, mixture):
            continue
        if importance is None:
            raise ImportanceNeeded(
                f"{mixture} needs an importance matrix: {name} becomes {kind}, which is noise without one. Give "
                "a text like what the model will read with --calibration, or a matrix with --importance."
            )
        if name not in importance.sums:
            raise ImportanceNeeded(
                f"{mixture} needs the importance of {name}, which becomes {kind}, but the matrix "
                f"{importance.origin} does not name it. Gather one with --calibration, or give another type."
            )


def _check_room(file: ModelFile, planned: dict[str, str], target: Path) -> None:
    if len(planned) != len(file.tensors):
        return
    needed, free = quantized_bytes(file, planned), shutil.disk_usage(target.parent).free
    if needed > free:
        raise ExportError(
            f"The disk is too full for {target.parent}: the result takes {format_size(needed)}, "
            f"{format_size(free)} are free. Free some space, or choose another -o."
        )


def _raise_if_disk_is_full(target: Path) -> None:
    """llama.cpp says only that a write failed. Writing a little more tells why, as an OSError."""
    with open(target, "ab") as part:
        part.write(bytes(1 << 20))


def _check_written(target: Path, planned: dict[str, str]) -> ModelFile:
    written = read_model_file(target)
    types = {tensor.name: tensor.type for tensor in written.tensors}
    if types != planned:
        name = next(name for name in {**types, **planned} if types.get(name) != planned.get(name))
        raise ExportError(
            f"llama.cpp wrote {name} as {types.get(name)}, expected {planned.get(name)}: llama-cpp-python "
            f"{llama_cpp.__version__} is not the version that edgeinfer knows."
        )
    return written


def _without_importance(
    file: ModelFile, planned: dict[str, str], importance: Importance | None
) -> tuple[str, ...] | None:
    if importance is None:
        return None

    def is_bare(tensor: TensorInfo) -> bool:
        return planned[tensor.name] not in FLOAT_TYPES and tensor.name not in importance.sums

    return tuple(tensor.name for tensor in file.tensors if is_bare(tensor))
