"""How fast this processor multiplies by a weight of each type, with the kernels that streamed weights use."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import llama_cpp

from edgeinfer.engines import ggml
from edgeinfer.remembered import remembered

_MATRIX_BYTES = 192 << 20  # far larger than processor caches: decoding reads its weights from memory
_WIDTH = 4096
_REPEATS = 3


def compute_bytes_per_second(
    weight_type: str, threads: int, room_bytes: int = _MATRIX_BYTES, again: bool = False
) -> float:
    """Bytes of weights of a ggml type ("Q4_0") that `threads` multiply by one vector in a second; kept.

    Measuring holds a matrix of at most `room_bytes`.
    """
    key = f"compute {processor()} llama-cpp-python {llama_cpp.__version__} {weight_type} {threads} threads"
    room = min(room_bytes, _MATRIX_BYTES)
    return remembered(key, lambda: measure(weight_type, threads, room), again, kind=float)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("model name", "CPU part")):
                    return line.split(":", 1)[1].strip() + f" x{os.cpu_count()}"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure(weight_type: str, threads: int, matrix_bytes: int = _MATRIX_BYTES) -> float:
    """Time ggml's product of one matrix with one vector; the best of a few, in bytes of the matrix per second."""
    kind = ggml.BLOCKS[weight_type]
    row_bytes = _WIDTH // kind.block_size * kind.block_bytes
    rows = max(64, matrix_bytes // row_bytes // 64 * 64)
    context = ggml.init(ggml.InitParams(rows * row_bytes + (16 << 20), None, False))
    if not context:
        raise MemoryError(f"no memory to measure products of {weight_type}")
    try:
        weights = ggml.new_tensor_2d(context, ggml.TYPE_NUMBERS[weight_type], _WIDTH, rows)
        vector = ggml.new_tensor_2d(context, ggml.TYPE_NUMBERS["F32"], _WIDTH, 1)
        ctypes.memset(ggml.get_data(weights), 0, ggml.nbytes(weights))
        ctypes.memset(ggml.get_data(vector), 0, ggml.nbytes(vector))
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, ggml.mul_mat(context, weights, vector))
        best = float("inf")
        for _ in range(_REPEATS + 1):  # the first one starts the threads
            start = time.perf_counter()
            ggml.graph_compute_with_ctx(context, graph, threads)
            best = min(best, time.perf_counter() - start)
        return rows * row_bytes / best
    finally:
        ggml.free(context)
