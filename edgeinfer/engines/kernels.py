"""How fast this processor multiplies by a weight of each type, with the kernels that streamed weights use."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import llama_cpp

from edgeinfer.ggml_types import GGML_TYPES
from edgeinfer.remembered import remembered

_TYPES = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}
_ROWS_BYTES = 32 << 20  # larger than the fast caches of a laptop: decoding reads weights from memory
_WIDTH = 4096
_REPEATS = 3


def compute_bytes_per_second(weight_type: str, threads: int) -> float:
    """Bytes of weights of a ggml type ("Q4_0") that `threads` multiply by one vector in a second; kept."""
    key = f"compute {processor()} llama-cpp-python {llama_cpp.__version__} {weight_type} {threads} threads"
    return float(remembered(key, lambda: measure(weight_type, threads)))


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


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _function(name: str, result: object, *arguments: object):
    function = getattr(llama_cpp.llama_cpp._lib, name)
    # A prototype of our own: the bindings may have set another one on the shared function object.
    return ctypes.CFUNCTYPE(result, *arguments)(ctypes.cast(function, ctypes.c_void_p).value)


def measure(weight_type: str, threads: int) -> float:
    """Time ggml's product of one matrix with one vector; the best of a few, in bytes of the matrix per second."""
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    init = _function("ggml_init", pointer, _InitParams)
    new_2d = _function("ggml_new_tensor_2d", pointer, pointer, integer, size, size)
    mul_mat = _function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    new_graph = _function("ggml_new_graph", pointer, pointer)
    expand = _function("ggml_build_forward_expand", None, pointer, pointer)
    compute = _function("ggml_graph_compute_with_ctx", integer, pointer, pointer, integer)
    data = _function("ggml_get_data", pointer, pointer)
    nbytes = _function("ggml_nbytes", ctypes.c_size_t, pointer)
    free = _function("ggml_free", None, pointer)

    number, kind = _TYPES[weight_type]
    row_bytes = _WIDTH // kind.block_size * kind.block_bytes
    rows = max(64, _ROWS_BYTES // row_bytes // 64 * 64)
    context = init(_InitParams(rows * row_bytes + (16 << 20), None, False))
    if not context:
        raise MemoryError(f"no memory to measure products of {weight_type}")
    try:
        weights = new_2d(context, number, _WIDTH, rows)
        vector = new_2d(context, _TYPES["F32"][0], _WIDTH, 1)
        ctypes.memset(data(weights), 0, nbytes(weights))
        ctypes.memset(data(vector), 0, nbytes(vector))
        graph = new_graph(context)
        expand(graph, mul_mat(context, weights, vector))
        best = float("inf")
        for _ in range(_REPEATS + 1):  # the first one starts the threads
            start = time.perf_counter()
            compute(context, graph, threads)
            best = min(best, time.perf_counter() - start)
        return rows * row_bytes / best
    finally:
        free(context)
