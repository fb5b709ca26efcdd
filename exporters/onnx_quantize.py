"""Which operators of a model get weights of 8 or 4 bits.

Convolutions are left alone: with activations quantized as they come, real models failed (error of the output:
97 % of it for a voice detector, 100 % for a text detector, 28 % for an object detector), for one range must
do for all of an image. They need calibration (onnx_static).
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import TensorProto

from edgeinfer.errors import ExportError
from edgeinfer.exporters.onnx_dynamic import OPERATORS, quantized_operator
from edgeinfer.exporters.onnx_nbits import INT4
from edgeinfer.exporters.onnx_products import (
    find_product,
    integer_embedding,
    integer_product,
    is_embedding,
    packed_product,
)
from edgeinfer.exporters.onnx_rewrite import Operator, Replacement, Rewriter
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_tensors import tensor_bytes

#: DynamicQuantizeLinear is an operator of this version.
INT8_OPSET = 11
#: Smaller weights stay: they gain nothing, for each weight begins a page.
SMALLEST_BYTES = 4096
_LARGEST_BYTES = 256 << 20  # the library takes 30 times the memory of a weight


def quantize_int8(graph: OnnxGraph, scratch: Scratch, progress: Callable[[float], None] | None = None) -> int:
    """Matrix products, embeddings, LSTMs and attention in 8 bits; how many. ExportError: there is none."""

    def replace(operator: Operator) -> Replacement | None:
        product = find_product(operator)
        if product is not None:
            return (
                integer_product(product, operator, graph.weights, scratch) if _pays(product.weight) else None
            )
        if is_embedding(operator):
            table = operator.weights[0]
            return integer_embedding(operator, graph.weights, scratch) if _pays(table) else None
        needed = OPERATORS.get(operator.kind, ())
        found = operator.float_weights(*needed)
        if not found or len(found) < len(needed) or not any(_pays(tensor) for tensor in found):
            return None
        return (
            quantized_operator(operator, graph) if max(map(tensor_bytes, found)) <= _LARGEST_BYTES else None
        )

    count = Rewriter(graph, scratch, replace, progress).run()
    return _some(count, "INT8", "matrix products, embeddings and LSTMs")


def quantize_int4(graph: OnnxGraph, scratch: Scratch, progress: Callable[[float], None] | None = None) -> int:
    """The weights of matrix products in 4 bits; how many. ExportError where there is none."""

    def replace(operator: Operator) -> Replacement | None:
        product = find_product(operator)
        if product is None or not _pays(product.weight):
            return None
        return packed_product(product, operator, graph.weights, INT4, scratch)

    return _some(Rewriter(graph, scratch, replace, progress).run(), "INT4", "matrix products")


def _pays(tensor: TensorProto) -> bool:
    return tensor_bytes(tensor) >= SMALLEST_BYTES


def _some(count: int, name: str, what: str) -> int:
    if count == 0:
        raise ExportError(
            f"{name} is for the weights of {what}, and this model has none of {SMALLEST_BYTES:,} bytes and "
            "more in float32. Expected another --quant: INT8_STATIC (with --calibration) for convolutions, "
            "or F16."
        )
    return count
