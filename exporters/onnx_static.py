"""8 bits with ranges learned from calibration data (QuantizeLinear and DequantizeLinear), by
onnxruntime.quantization.

Measured on six real models, as the error of their outputs: quantizing only convolutions and matrix products
leaves 2 % for a file classifier and 16 % for a voice detector, with all operators that can be (the default of
the library) it is 119 % and 98 %. Ranges are the smallest and largest values seen: percentiles were sometimes
better, sometimes worse, and took up to 100 times as long.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto

from edgeinfer.errors import ExportError
from edgeinfer.exporters.onnx_calibration import CalibrationData
from edgeinfer.exporters.onnx_graph import standard_opset
from edgeinfer.exporters.onnx_source import OnnxGraph, open_onnx
from edgeinfer.exporters.onnx_write import write_onnx
from edgeinfer.onnx.ports import make_port
from edgeinfer.onnx.runtime import explained, make_session, session_options

#: Scales for each channel are written for operators of this version.
OPSET = 13
_WARNINGS, _FATAL_ONLY = 2, 4  # ONNX Runtime's severities; the first is its default
_OPERATORS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


@dataclass(frozen=True)
class StaticForm:
    """`symmetric`: activations are int8 around zero; else uint8, which loses less.

    `integer_biases`: biases are int32, else float32.
    """

    symmetric: bool
    integer_biases: bool


#: TensorRT takes int8 with a zero point of zero only, and refuses DequantizeLinear of int32:
#: https://docs.nvidia.com/deeplearning/tensorrt/latest/ (inference library, explicit quantization)
FORMS = {"INT8_STATIC": StaticForm(False, True), "INT8_TENSORRT": StaticForm(True, False)}


def quantize_static(
    graph: OnnxGraph, form: StaticForm, calibration: Path, scratch: Path, source: object
) -> tuple[OnnxGraph, int]:
    """The model with quantized activations and weights, and how many operators were quantized. It is whole in
    memory.

    `source`: its name in errors.

    Raises ExportError: calibration data that does not fit, nothing to quantize, what the library refuses.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    floats, result = scratch / "floats.onnx", scratch / "static.onnx"
    _name_nodes(graph.proto)
    write_onnx(graph, floats)
    reader = CalibrationData(calibration, _ports(floats, source))
    with explained(f"{source}, quantizing it", ExportError), _quiet():
        quantize(
            str(floats),
            str(result),
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            per_channel=standard_opset(graph.proto) >= OPSET,
            activation_type=QuantType.QInt8 if form.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_grouped_transposed(graph.proto),
            use_external_data_format=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": form.symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": form.integer_biases,
            },
        )
    quantized = open_onnx(result)
    count = _count_quantized(quantized.proto)
    if count == 0:
        raise ExportError(
            f"{source}: nothing to quantize: expected convolutions or matrix products in float32 outside of "
            "If and Loop, found none. Try --quant INT8 or F16."
        )
    quantized.proto.ClearField("metadata_props")
    quantized.proto.metadata_props.extend(graph.proto.metadata_props)
    return quantized, count


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the library and its sessions, whose settings it makes itself, write."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    ort.set_default_logger_severity(_FATAL_ONLY)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)
        logging.disable(disabled)


def _count_quantized(model: ModelProto) -> int:
    nodes = model.graph.node
    made = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return sum(node.op_type in _OPERATORS and not made.isdisjoint(node.input) for node in nodes)


def _ports(path: Path, source: object) -> list:
    with explained(source, ExportError):
        session = make_session(str(path), session_options(1))
    return [make_port(port.name, port.type, port.shape) for port in session.get_inputs()]


def _name_nodes(model: ModelProto) -> None:
    """Names say which nodes are left out."""
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{place}"


def _grouped_transposed(model: ModelProto) -> list[str]:
    """For these the library takes the wrong number of channels."""
    return [node.name for node in model.graph.node if node.op_type == "ConvTranspose" and _group(node) > 1]


def _group(node: NodeProto) -> int:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "group"), 1)
