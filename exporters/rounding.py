"""Weights as a ggml type would keep them: rows of a GGUF file's tensors, quantized and read back."""

from __future__ import annotations

import ctypes
from functools import cache
from math import prod

import llama_cpp
import numpy as np

from edgeinfer.engines import ggml
from edgeinfer.errors import EngineError, ReadError
from edgeinfer.modelfile import ModelFile, TensorInfo


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of llama-cpp-python 0.3.36."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def _to_float(type: str):
    number, block = ggml.TYPE_NUMBERS[type], ggml.BLOCKS[type]
    traits = _TypeTraits.from_address(ggml.get_type_traits(number))
    if (
        (traits.block_size, traits.block_bytes) != (block.block_size, block.block_bytes)
        or traits.type_name.decode().upper() != type
        or not traits.to_float
    ):
        raise EngineError(
            f"This llama.cpp ({llama_cpp.__version__}) describes the type {type} in a way that edgeinfer does not "
            "know. Install llama-cpp-python 0.3.36 or a later 0.3."
        )
    return _ToFloat(traits.to_float)


def row_bytes(type: str, columns: int) -> int:
    block = ggml.BLOCKS[type]
    return columns // block.block_size * block.block_bytes


def quantize(values: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 (rows, bytes of a row): float32 `values` (rows, columns) as `type`.

    `importance`: float32 (columns,), the mean squares that errors are weighted by.
    """
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    packed = np.empty((rows, row_bytes(type, columns)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = weights.ctypes.data if weights is not None else None
    ggml.quantize_chunk(
        ggml.TYPE_NUMBERS[type], values.ctypes.data, packed.ctypes.data, 0, rows, columns, address
    )
    return packed


def dequantize(packed: np.ndarray, type: str, columns: int) -> np.ndarray:
    """float32 (rows, columns) of uint8 (rows, bytes of a row)."""
    if type == "F32":
        return packed.reshape(-1).view(np.float32).reshape(-1, columns)
    packed = np.ascontiguousarray(packed)
    values = np.empty((len(packed), columns), np.float32)
    _to_float(type)(packed.ctypes.data, values.ctypes.data, values.size)
    return values


def num_rows(tensor: TensorInfo) -> int:
    return prod(tensor.shape[1:])


def rows_of(file: ModelFile, tensor: TensorInfo, rows: np.ndarray | None = None) -> np.ndarray:
    """float32 (rows, columns): weights of `tensor` in its file; `rows` (None: all) count through all experts."""
    columns = tensor.shape[0]
    shape = num_rows(tensor), row_bytes(tensor.type, columns)
    try:
        stored = np.memmap(file.paths[tensor.part], np.uint8, "r", tensor.offset, shape)
    except (OSError, ValueError) as error:
        raise ReadError(f"{file.paths[tensor.part]}: {tensor.name} cannot be read: {error}.") from error
    return dequantize(np.array(stored if rows is None else stored[rows]), tensor.type, columns)
