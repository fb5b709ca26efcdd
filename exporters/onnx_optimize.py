"""ONNX Runtime's own graph optimizer, as far as its result suits every processor and every program.

The basic level only: constants folded, BatchNorm merged into convolutions, what is not needed removed. Its
result has standard operators only. The extended level adds operators that only ONNX Runtime's CPU kernels
have, and the layout level follows the processor: a session applies both anyway when it opens the file.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnx import ModelProto, TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from edgeinfer.errors import ModelFileError
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_tensors import all_tensors
from edgeinfer.exporters.onnx_weights import Weights
from edgeinfer.onnx.nested import all_graphs
from edgeinfer.onnx.runtime import explained, make_session, session_options

#: MatMul followed by Add stays as it is (Gemm hides it from the quantizers); equal small constants stay
#: apart.
_LEFT_OUT = ["MatMulAddFusion", "ConstantSharing"]
_HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def can_optimize(model: ModelProto) -> bool:
    """Whether nothing is computed in 16 bits: for that, ONNX Runtime writes casts into the file that suit
    this CPU.
    """
    values = [
        value
        for graph in all_graphs(model.graph)
        for value in (*graph.input, *graph.output, *graph.value_info)
    ]
    types = {value.type.tensor_type.elem_type for value in values}
    types |= {tensor.data_type for tensor in all_tensors(model)}
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    types |= {a.i for node in nodes for a in node.attribute if node.op_type == "Cast" and a.name == "to"}
    return not types & _HALF


def optimize(graph: OnnxGraph, path: Path, scratch: Path) -> OnnxGraph:
    """The same model with a simpler graph. Weights that did not change are not read; changed ones are in
    memory.

    `path`: the model's name in errors. Raises ModelFileError where ONNX Runtime refuses the model.
    """
    target = scratch / "optimized.onnx"
    with explained(path, ModelFileError):
        try:
            _run(graph, _options(graph.folder, target))
            folder = graph.folder
        except InvalidProtobuf:  # more changed than fits into one file: have all weights beside it
            options = _options(graph.folder, target)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimized.weights"
            )
            _run(graph, options)
            folder = scratch
    proto = ModelProto.FromString(target.read_bytes())
    target.unlink()
    proto.ClearField("metadata_props")
    proto.metadata_props.extend(graph.proto.metadata_props)
    return OnnxGraph(proto, Weights(folder), folder)


def _options(folder: Path, target: Path) -> ort.SessionOptions:
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    for key, value in {
        "session.disable_prepacking": "1",  # the session is never run
        "session.qdqisint8allowed": "1",  # on some processors 8-bit weights would change their sign
        "session.model_external_initializers_file_folder_path": str(folder),
    }.items():
        options.add_session_config_entry(key, value)
    return options


def _run(graph: OnnxGraph, options: ort.SessionOptions) -> None:
    make_session(graph.proto.SerializeToString(), options, disabled_optimizers=_LEFT_OUT)
