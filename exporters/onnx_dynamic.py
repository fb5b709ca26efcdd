"""Operators with weights computed in 8 bits, activations quantized as they come, by ONNX Runtime's own
quantizer.

Matrix products, LSTMs and embeddings only. Convolutions are left alone: quantized the same way, real models
failed (error of the output: 97 % of it for a voice detector, 100 % for a text detector, 28 % for an object
detector), because one range must do for all of an image. They need calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from onnx import ModelProto, NodeProto, TensorProto

#: Operator (domain, name) -> which inputs must be weights.
OPERATORS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("", "MatMul"): (1,),
    ("", "Gemm"): (1,),
    ("", "LSTM"): (1, 2),
    ("", "Gather"): (0,),
    ("com.microsoft", "Attention"): (1,),
}


def quantize_operator(model: ModelProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and tensors that take the place of the one node of `model`, which holds its weights."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    before = {tensor.name for tensor in model.graph.initializer}
    operator = model.graph.node[0].op_type
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns that each of these small models was not prepared
    try:
        quantizer = ONNXQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            mode=QuantizationMode.IntegerOps,
            static=False,
            weight_qType=QuantType.QInt8 if operator != "Gather" else QuantType.QUInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=None,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=[operator if operator != "Gemm" else "MatMul"],
            extra_options={"MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
    finally:
        logging.disable(disabled)
    graph = quantizer.model.model.graph
    return list(graph.node), [tensor for tensor in graph.initializer if tensor.name not in before]
