"""Matrix products and embeddings whose weights are kept in fewer bits, one weight in memory at a time.

onnxruntime.quantization makes the same operators, but takes 30 times the memory of a weight and 40 s for a
gigabyte, and has one scale for all of an embedding; here each column of a matrix and each row of an embedding
has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from edgeinfer.exporters.onnx_nbits import BlockFormat, PackedMatrix, pack
from edgeinfer.exporters.onnx_rewrite import Operator, Replacement
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_weights import Weights
from edgeinfer.exporters.parallel import in_order

_CHUNK_BYTES = 4 << 20
_LARGEST = 127  # of int8, symmetric


@dataclass(frozen=True)
class Product:
    """A product by `weight`, (rows, columns), or the other way round where `transposed`; then `bias`."""

    weight: TensorProto
    transposed: bool
    bias: str


def find_product(operator: Operator) -> Product | None:
    """The operator as a product with a weight of two dimensions on the right, if that is what it is."""
    found = operator.float_weights(1)
    if not found or len(found[0].dims) != 2:
        return None
    if operator.kind == ("", "MatMul"):
        return Product(found[0], False, "")
    if operator.kind != ("", "Gemm"):
        return None
    attributes = operator.node.attribute
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in attributes}
    if values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0 or values.get("transA", 0):
        return None
    inputs = operator.node.input
    return Product(found[0], bool(values.get("transB", 0)), inputs[2] if len(inputs) > 2 else "")


def _with_bias(product: Product, operator: Operator, nodes: list[NodeProto]) -> list[NodeProto]:
    """`nodes`, the last of which gives the product, and what adds the bias to it."""
    result = operator.node.output[0]
    if not product.bias:
        nodes[-1].output[0] = result
        return nodes
    nodes[-1].output[0] = f"{result}_product"
    return [*nodes, helper.make_node("Add", [f"{result}_product", product.bias], [result])]


def packed_product(
    product: Product, operator: Operator, weights: Weights, form: BlockFormat, scratch: Scratch
) -> Replacement:
    """The weight in blocks of few bits, computed in float32."""
    matrix = _pack(product, weights, form, scratch)
    nodes = [matrix.node(operator.node.name, operator.node.input[0], "")]
    return Replacement(_with_bias(product, operator, nodes), list(matrix.tensors))


def _pack(product: Product, weights: Weights, form: BlockFormat, scratch: Scratch) -> PackedMatrix:
    array = weights.array(product.weight)
    matrix = array.T if product.transposed else array
    return pack(product.weight.name, matrix.shape, lambda a, b: matrix[:, a:b], form, scratch)


def integer_product(product: Product, operator: Operator, weights: Weights, scratch: Scratch) -> Replacement:
    """The product of integers: activations quantized as they come, to uint8, the weight's columns to int8."""
    values, scales = _quantize(weights.array(product.weight), axis=0 if product.transposed else 1)
    if product.transposed:
        values = np.ascontiguousarray(values.T)
    name, given = product.weight.name, operator.node.input[0]
    integers, factors = f"{name}_quantized", f"{name}_scale"
    tensors = [
        (_header(integers, values), scratch.add(values)),
        (_header(factors, scales), scratch.add(scales)),
    ]
    quantized = [f"{given}_quantized", f"{given}_scale", f"{given}_zero_point"]
    made = operator.node.output[0]
    inputs = [quantized[0], integers, quantized[2]]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [given], quantized),
        helper.make_node("MatMulInteger", inputs, [f"{made}_integers"], operator.node.name),
        helper.make_node("Cast", [f"{made}_integers"], [f"{made}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [quantized[1], factors], [f"{made}_factors"]),
        helper.make_node("Mul", [f"{made}_cast", f"{made}_factors"], [""]),
    ]
    return Replacement(_with_bias(product, operator, nodes), tensors)


def is_embedding(operator: Operator) -> bool:
    """Whether rows are taken from a weight of two dimensions."""
    found = operator.float_weights(0)
    if operator.kind != ("", "Gather") or not found or len(found[0].dims) != 2:
        return False
    return not any(attribute.name == "axis" and attribute.i % 2 for attribute in operator.node.attribute)


def integer_embedding(operator: Operator, weights: Weights, scratch: Scratch) -> Replacement:
    """The rows in int8; those that are taken are made float32."""
    table, indices, made = operator.weights[0], operator.node.input[1], operator.node.output[0]
    values, scales = _quantize(weights.array(table), axis=0)
    scales = scales[:, None]
    integers, factors = f"{table.name}_quantized", f"{table.name}_scale"
    tensors = [
        (_header(integers, values), scratch.add(values)),
        (_header(factors, scales), scratch.add(scales)),
    ]
    nodes = [
        helper.make_node("Gather", [integers, indices], [f"{made}_integers"], operator.node.name),
        helper.make_node("Cast", [f"{made}_integers"], [f"{made}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [factors, indices], [f"{made}_factors"]),
        helper.make_node("Mul", [f"{made}_cast", f"{made}_factors"], [made]),
    ]
    return Replacement(nodes, tensors)


def _header(name: str, array: np.ndarray) -> TensorProto:
    return TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)


def _quantize(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 of a matrix, and the float32 scales of what lies along `axis`."""
    step = max(1, _CHUNK_BYTES // (4 * array.shape[1]))
    parts = [slice(start, start + step) for start in range(0, len(array), step)]
    found = list(in_order(lambda rows: np.abs(array[rows]).max(axis=1 - axis), parts))
    largest = np.concatenate(found) if axis == 0 else np.max(found, axis=0)
    scales = np.where(largest > 0, largest / _LARGEST, 1).astype(np.float32)
    values = np.empty(array.shape, np.int8)

    def fill(rows: slice) -> None:
        values[rows] = np.rint(array[rows] / (scales[rows, None] if axis == 0 else scales))

    for _ in in_order(fill, parts):
        pass
    return values, scales
