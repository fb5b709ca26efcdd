"""An ONNX file opened for export: its graph in memory, its large tensors as references into files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from edgeinfer.errors import ModelFileError
from edgeinfer.exporters.onnx_graph import lift_constants
from edgeinfer.exporters.onnx_tensors import all_tensors, is_external
from edgeinfer.exporters.onnx_weights import Weights, raw_bytes
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.nested import all_graphs


@dataclass
class OnnxGraph:
    """A model of which `proto` holds little and `weights` knows where the rest is.

    Locations in `proto` that are names of files lead into `folder`.
    """

    proto: ModelProto
    weights: Weights
    folder: Path


def open_onnx(path: str | os.PathLike) -> OnnxGraph:
    """Open the model at `path`; nothing of its large tensors is read.

    Raises ModelFileError for what is no ONNX model, and for external data that is missing, short, or outside
    the model's folder.
    """
    path = Path(path)
    file = read_onnx(path)
    try:
        proto = ModelProto.FromString(file.skeleton)
    except (DecodeError, RecursionError):
        raise ModelFileError(
            f"{path} is not an ONNX model, or is damaged: its protobuf cannot be read. Download it again."
        ) from None
    _check_inside(proto, path)
    proto.ClearField("training_info")
    for graph in all_graphs(proto.graph):
        lift_constants(graph)
    folder = _follow_links(proto, path)
    return OnnxGraph(proto, Weights(folder), folder)


def _follow_links(proto: ModelProto, path: Path) -> Path:
    """Name the files that links lead to (caches of downloads hold links): ONNX Runtime refuses links. Their
    folder.
    """
    folder = path.resolve().parent
    for tensor in all_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(os.path.realpath(path.parent / entry.value), folder)
    return folder


def _check_inside(proto: ModelProto, path: Path) -> None:
    """That the tensors that hold their data themselves hold what their type and shape say."""
    for tensor in all_tensors(proto):
        if is_external(tensor) or tensor.data_type == TensorProto.STRING:
            continue
        try:
            raw_bytes(tensor)
        except (ValueError, TypeError) as error:
            raise ModelFileError(
                f"{path}: tensor {tensor.name[:200]!r}: {error}. The file is damaged: download it again."
            ) from None
