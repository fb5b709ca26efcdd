"""A checkpoint's tensors as weights of an ONNX decoder, read when they are written."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer
from edgeinfer.exporters.conversion import STORAGE, to_float32
from edgeinfer.exporters.onnx_float16 import half
from edgeinfer.exporters.onnx_weights import Computed, FilePart
from edgeinfer.exporters.tensor_plan import Piece, PlannedTensor

_CHUNK_ELEMENTS = 4 << 20
_ROWS, _CACHED_ROWS = 512, 64  # read and turned at once: six times as fast as all of a matrix


_local = threading.local()  # a buffer for each thread, so that its memory is touched once


def rows(tensor: PlannedTensor, start: int, stop: int) -> np.ndarray:
    """float32 (stop - start, ...) of a tensor's rows. The next call in the same thread may overwrite them."""
    width = tensor.num_elements // tensor.shape[0]
    return _elements(tensor, start * width, stop * width).reshape(stop - start, *tensor.shape[1:])


def _elements(tensor: PlannedTensor, start: int, stop: int) -> np.ndarray:
    parts, place = [], 0
    for piece in tensor.pieces:
        first, last = max(start - place, 0), min(stop - place, piece.num_elements)
        if first < last:
            stored = to_float32(_stored(piece, first, last), piece.record.dtype)
            parts.append(stored if last - first == stop - start else stored.copy())
        place += piece.num_elements
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return found + np.float32(tensor.add) if tensor.add else found


def _stored(piece: Piece, first: int, last: int) -> np.ndarray:
    """Elements of a piece as they are on disk."""
    record, dtype = piece.record, STORAGE[piece.record.dtype]
    size = (last - first) * dtype.itemsize
    if not hasattr(_local, "buffer") or len(_local.buffer) < size + 2 * PAGE:
        _local.buffer = AlignedBuffer(size + 2 * PAGE)
    whole = FilePart(record.path, record.offset, record.num_bytes)
    return np.frombuffer(whole.read((piece.first + first) * dtype.itemsize, size, _local.buffer), dtype)


def weight_name(tensor: PlannedTensor) -> str:
    """Its name in the checkpoint."""
    return tensor.pieces[0].record.name


def plain(tensor: PlannedTensor, kind: int) -> tuple[TensorProto, Computed]:
    """The tensor as it is, in float32 or float16 (`kind`)."""
    step = max(1, _CHUNK_ELEMENTS * tensor.shape[0] // tensor.num_elements)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, tensor.shape[0], step):
            yield _as(rows(tensor, start, min(tensor.shape[0], start + step)), kind)

    return _weight(tensor, tensor.shape, kind, pieces, weight_name(tensor))


def transposed(tensor: PlannedTensor, kind: int) -> tuple[TensorProto, Computed]:
    """The matrix (out, in) as MatMul wants it, (in, out): whole in memory while it is written."""

    def pieces() -> Iterator[np.ndarray]:
        count, width = tensor.shape
        turned = np.empty((width, count), np.float16 if kind == TensorProto.FLOAT16 else np.float32)
        for start in range(0, count, _ROWS):
            block = _as(rows(tensor, start, min(count, start + _ROWS)), kind)
            for first in range(0, len(block), _CACHED_ROWS):
                part = block[first : first + _CACHED_ROWS]
                turned[:, start + first : start + first + len(part)] = part.T
        yield turned

    return _weight(tensor, tensor.shape[::-1], kind, pieces, f"{weight_name(tensor)}.transposed")


def _as(array: np.ndarray, kind: int) -> np.ndarray:
    return half(array) if kind == TensorProto.FLOAT16 else array


def _weight(
    tensor: PlannedTensor, shape: tuple[int, ...], kind: int, pieces: object, name: str
) -> tuple[TensorProto, Computed]:
    size = 2 if kind == TensorProto.FLOAT16 else 4
    key = (name, kind, tensor.pieces)
    return TensorProto(name=name, data_type=kind, dims=shape), Computed(
        size * tensor.num_elements, pieces, key
    )
