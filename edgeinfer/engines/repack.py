"""Weights repacked for this processor: which of llama.cpp's ways run here, and which weights they take.

llama.cpp's own choice can end the process: a virtual machine may show AMX that it cannot use. So every way is tried
once, in a child process, on small products whose results are compared with the plain kernels'; what ran right is
remembered. Run as a program (`python -m edgeinfer.engines.repack NAME TYPE...`) this is that child.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys

import llama_cpp
import numpy as np

from edgeinfer.engines import ggml
from edgeinfer.engines.kernels import processor
from edgeinfer.modelfile import ModelFile, TensorInfo
from edgeinfer.remembered import remembered

_PRODUCTS = re.compile(r"output|attn_(q|k|v|qkv|output|q_a|q_b|kv_a_mqa)|ffn_(gate|up|down|gate_up)(_shexp|_exps)?")
_WIDTH, _ROWS = 512, 128
_TRIAL_SECONDS = 60


def working_overrides(file: ModelFile) -> list[tuple[str, int]]:
    """(pattern of weight names, buffer type) for the weights of `file` that are repacked in a way that runs here.

    For llama_model_params.tensor_buft_overrides. Every weight gets the first of llama.cpp's ways that takes it.
    """
    products = [tensor for tensor in file.tensors if _is_product(tensor)]
    types = sorted({tensor.type for tensor in products})
    names: dict[int, list[str]] = {}
    ways = [(runs_here(name, types), number) for name, number in ggml.extra_buffer_types().items()]
    for tensor in products:
        for runs, buffer_type in ways:
            if runs.get(tensor.type) and _takes(buffer_type, tensor.type, tensor.shape):
                names.setdefault(buffer_type, []).append(tensor.name)
                break
    return [(_pattern(found), buffer_type) for buffer_type, found in names.items()]


def _is_product(tensor: TensorInfo) -> bool:
    """Whether every architecture only multiplies by this weight; rows and views cannot be taken of a repacked one."""
    return _PRODUCTS.fullmatch(tensor.role) is not None and len(tensor.shape) == (3 if tensor.num_experts else 2)


def _pattern(names: list[str]) -> str:
    """A regular expression for exactly these names: numbers of layers are listed for each role."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(blk\.)([0-9]+)(\..*)", name)
        before, layer, role = match.groups() if match else (name, "", "")
        layers.setdefault((before, role), []).append(layer)
    parts = [f"{re.escape(b)}({'|'.join(n)}){re.escape(role)}" for (b, role), n in sorted(layers.items())]
    return f"^({'|'.join(parts)})$"


def runs_here(name: str, types: list[str]) -> dict[str, bool]:
    """Type -> whether repacking it by the way `name` gives right products on this processor; tried once, remembered."""
    key = f"repack {name} {processor()} llama-cpp-python {llama_cpp.__version__} {' '.join(types)}"
    return remembered(key, lambda: _try_in_child(name, types), kind=dict)


def _try_in_child(name: str, types: list[str]) -> dict[str, bool]:
    command = [sys.executable, "-m", "edgeinfer.engines.repack", name, *types]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
        return json.loads(child.stdout) if child.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}


def _takes(buffer_type: int, weight_type: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp can multiply by a weight of this type and shape in this kind of buffer."""
    context = ggml.init(ggml.InitParams(1 << 20, None, True))
    buffer = ggml.backend_buft_alloc_buffer(buffer_type, 0)
    try:
        weight, product = _product(context, weight_type, shape, columns=512)
        ctypes.cast(weight, ctypes.POINTER(ggml.TensorHead)).contents.buffer = buffer
        return ggml.backend_dev_supports_op(ggml.cpu_device(), product)
    finally:
        ggml.backend_buffer_free(buffer)
        ggml.free(context)


def _product(context: int, weight_type: str, shape: tuple[int, ...], columns: int) -> tuple[int, int]:
    """(weight, product node) of a weight of `shape` and `columns` float32 vectors; of 3 dimensions: experts."""
    number, f32 = ggml.TYPE_NUMBERS[weight_type], ggml.TYPE_NUMBERS["F32"]
    if len(shape) == 2:
        weight = ggml.new_tensor_2d(context, number, *shape)
        return weight, ggml.mul_mat(context, weight, ggml.new_tensor_2d(context, f32, shape[0], columns))
    weight = ggml.new_tensor_3d(context, number, *shape)
    vectors = ggml.new_tensor_3d(context, f32, shape[0], 1, columns)
    ids = ggml.new_tensor_2d(context, ggml.TYPE_NUMBERS["I32"], 1, columns)
    return weight, ggml.mul_mat_id(context, weight, vectors, ids)


def _trial(buffer_type: int, weight_type: str) -> bool:
    """Whether a repacked product equals the plain one, for one vector and for several."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((_ROWS, _WIDTH), dtype=np.float32)
    block = ggml.BLOCKS[weight_type]
    packed = np.empty(_ROWS * _WIDTH // block.block_size * block.block_bytes, dtype=np.uint8)
    number = ggml.TYPE_NUMBERS[weight_type]
    ggml.quantize_chunk(number, values.ctypes.data, packed.ctypes.data, 0, _ROWS, _WIDTH, None)
    for columns in (1, 7, 64):
        vectors = rng.standard_normal((columns, _WIDTH), dtype=np.float32)
        plain = _multiply(None, weight_type, packed, vectors)
        repacked = _multiply(buffer_type, weight_type, packed, vectors)
        # Activations are rounded to 8 bits in blocks of 32 or 256, which differs between kernels.
        if not np.allclose(repacked, plain, rtol=0.02, atol=0.02 * np.abs(plain).max()):
            return False
    return True


def _multiply(buffer_type: int | None, weight_type: str, packed: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """float32 (columns, rows): `vectors` times the weight in `packed`, held in that kind of buffer (None: plain)."""
    number, f32 = ggml.TYPE_NUMBERS[weight_type], ggml.TYPE_NUMBERS["F32"]
    weights = ggml.init(ggml.InitParams(1 << 16 if buffer_type else 1 << 20, None, buffer_type is not None))
    context = ggml.init(ggml.InitParams(16 << 20, None, False))
    buffer = None
    try:
        weight = ggml.new_tensor_2d(weights, number, _WIDTH, _ROWS)
        if buffer_type is None:
            ctypes.memmove(ggml.get_data(weight), packed.ctypes.data, packed.nbytes)
        else:
            buffer = ggml.backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
            ggml.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        vector = ggml.new_tensor_2d(context, f32, _WIDTH, len(vectors))
        ctypes.memmove(ggml.get_data(vector), vectors.ctypes.data, vectors.nbytes)
        product = ggml.mul_mat(context, weight, vector)
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, product)
        ggml.graph_compute_with_ctx(context, graph, 2)
        result = np.empty((len(vectors), _ROWS), dtype=np.float32)
        ctypes.memmove(result.ctypes.data, ggml.get_data(product), result.nbytes)
        return result
    finally:
        if buffer:
            ggml.backend_buffer_free(buffer)
        ggml.free(context)
        ggml.free(weights)


def main(name: str, *types: str) -> None:
    """The child: print which of `types` the way `name` multiplies rightly."""
    buffer_type = ggml.extra_buffer_types()[name]
    shape = (_WIDTH, _ROWS)
    print(json.dumps({kind: _takes(buffer_type, kind, shape) and _trial(buffer_type, kind) for kind in types}))


if __name__ == "__main__":
    main(*sys.argv[1:])
