"""The few functions of ggml that edgeinfer calls itself, with prototypes of their own."""

from __future__ import annotations

import ctypes
from functools import cache

import llama_cpp

from edgeinfer.ggml_types import GGML_TYPES

TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
BLOCKS = {kind.name: kind for kind in GGML_TYPES.values()}


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class TensorHead(ctypes.Structure):
    """The beginning of struct ggml_tensor, which edgeinfer._native checks against the library."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p)]


_P, _I, _L, _Z, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple] = {
    "ggml_init": (_P, InitParams),
    "ggml_free": (None, _P),
    "ggml_new_tensor_1d": (_P, _P, _I, _L),
    "ggml_new_tensor_2d": (_P, _P, _I, _L, _L),
    "ggml_new_tensor_3d": (_P, _P, _I, _L, _L, _L),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_graph_compute_with_ctx": (_I, _P, _P, _I),
    "ggml_get_data": (_P, _P),
    "ggml_nbytes": (_Z, _P),
    "ggml_quantize_chunk": (_Z, _I, _P, _P, _L, _L, _L, _P),
    "ggml_get_type_traits": (_P, _I),
    "ggml_op_name": (_S, _I),
    "ggml_set_name": (_P, _P, _S),
    "ggml_backend_dev_by_type": (_P, _I),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, _S),
    "ggml_backend_buft_name": (_S, _P),
    "ggml_backend_buft_alloc_buffer": (_P, _P, _Z),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _Z, _Z),
}


@cache
def function(name: str):
    """A function of the loaded ggml. The bindings may share function objects, so each has its own prototype here."""
    address = ctypes.cast(getattr(llama_cpp.llama_cpp._lib, name), ctypes.c_void_p).value
    return ctypes.CFUNCTYPE(*_PROTOTYPES[name])(address)


def __getattr__(name: str):
    """`ggml.init(...)` is ggml_init(...)."""
    if "ggml_" + name in _PROTOTYPES:
        return function("ggml_" + name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def cpu_device() -> int:
    """ggml's device for the processor (GGML_BACKEND_DEVICE_TYPE_CPU is 0)."""
    return function("ggml_backend_dev_by_type")(0)


def extra_buffer_types() -> dict[str, int]:
    """Name -> buffer type, of those in which this processor's weights can be repacked, best first."""
    registry = function("ggml_backend_dev_backend_reg")(cpu_device())
    address = function("ggml_backend_reg_get_proc_address")(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return {}
    types = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(cpu_device())
    found = {}
    for i in range(16):
        if not types or not types[i]:
            break
        found[function("ggml_backend_buft_name")(types[i]).decode()] = types[i]
    return found
