"""LSTMs and attention computed in 8 bits, activations quantized as they come, by onnxruntime.quantization."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from onnx import GraphProto, ModelProto, TensorProto, helper

from edgeinfer.exporters.onnx_rewrite import Operator, Replacement
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_weights import Inline, raw_bytes

#: Operator (domain, name) -> which inputs must be weights.
OPERATORS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("", "LSTM"): (1, 2),
    ("com.microsoft", "Attention"): (1,),
}


def quantized_operator(operator: Operator, graph: OnnxGraph) -> Replacement | None:
    """What takes the place of the operator; None where the library leaves it as it is."""
    model = _model_of(operator, graph)
    before = {tensor.name for tensor in model.graph.initializer}
    found = _quantize(model, operator.node.op_type)
    if any(
        node.op_type == operator.node.op_type and node.domain == operator.node.domain for node in found.node
    ):
        return None
    made = [tensor for tensor in found.initializer if tensor.name not in before]
    return Replacement(list(found.node), [(tensor, Inline(raw_bytes(tensor))) for tensor in made])


def _model_of(operator: Operator, graph: OnnxGraph) -> ModelProto:
    """A model of this one node, with its weights inside."""
    node = operator.node
    weights = []
    for tensor in operator.weights.values():
        weights.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
        weights[-1].raw_data = b"".join(graph.weights.source(tensor).pieces())
    known = {tensor.name for tensor in weights}
    inputs = [
        helper.make_tensor_value_info(name, operator.types.get(name, TensorProto.FLOAT), None)
        for name in dict.fromkeys(node.input)
        if name and name not in known
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output if name]
    body = helper.make_graph([node], "operator", inputs, outputs, weights)
    return helper.make_model(body, opset_imports=graph.proto.opset_import, ir_version=graph.proto.ir_version)


def _quantize(model: ModelProto, operator: str) -> GraphProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns that each of these small models was not prepared
    try:
        quantizer = ONNXQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            mode=QuantizationMode.IntegerOps,
            static=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=None,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=[operator],
            extra_options={},
        )
        quantizer.quantize_model()
    finally:
        logging.disable(disabled)
    return quantizer.model.model.graph
