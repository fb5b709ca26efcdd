"""The types that llama.cpp quantizes to: mixtures by name ("Q4_K_M"), those of single tensors, and their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import llama_cpp

from edgeinfer.engines.ggml import BLOCKS
from edgeinfer.errors import ExportError
from edgeinfer.modelfile import ModelFile

FLOAT_TYPES = ("F32", "F16", "BF16")
_INTEGER_TYPES = ("I8", "I16", "I32", "I64", "F64")  # tables, never weights of a product
_ENUM = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(.+)")
_NOT_WRITTEN = ("NVFP4",)  # llama_model_quantize has no default type for it
#: Name -> number of every mixture that llama_model_quantize makes ("Q4_K_M" -> 15): its enum llama_ftype.
QUANT_TYPES: dict[str, int] = {
    match[1]: number
    for key, number in vars(llama_cpp).items()
    if (match := _ENUM.fullmatch(key)) and match[1] not in _NOT_WRITTEN
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
#: The types that a single tensor can have: those that ggml_quantize_chunk makes.
TENSOR_TYPES = tuple(name for name in BLOCKS if name not in (*_INTEGER_TYPES, *_NOT_WRITTEN, "Q8_1", "Q8_K"))

#: Noise without importance, says llama.cpp (tensor_requires_imatrix); without it, these end ggml's process.
_CANNOT_DO_WITHOUT = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
_BAD_WITHOUT = ("IQ1_M", "IQ2_S", "IQ3_XXS")
_EXEMPT = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
FILE_ALIGNMENT = 32  # of what llama_model_quantize writes, whatever its source has
HEADER_ALLOWANCE = 1024  # keys that it adds


def find_type(name: str) -> str:
    """The name in QUANT_TYPES that `name` means, in any case; "Q4_K" means Q4_K_M. Raises ExportError."""
    found = _ALIASES.get(name.upper(), name.upper())
    if found not in QUANT_TYPES:
        raise ExportError(f"The type {name[:40]!r} is unknown. Expected one of {', '.join(QUANT_TYPES)}.")
    return found


def needs_importance(tensor: str, type: str, mixture: str = "") -> bool:
    """Whether llama.cpp refuses to make `tensor` a `type` without its importance, in a file that is a `mixture`."""
    if type in _CANNOT_DO_WITHOUT:
        return True
    bad = type in _BAD_WITHOUT or type == "Q2_K" and mixture == "Q2_K_S"
    return bad and tensor not in _EXEMPT


def quantized_tensor(file: ModelFile) -> str | None:
    """The name of a tensor of `file` that is quantized, None where there is none."""
    return next((t.name for t in file.tensors if t.type not in (*FLOAT_TYPES, *_INTEGER_TYPES)), None)


def bits_per_weight(file: ModelFile) -> float:
    return file.weights_bytes * 8 / max(1, file.num_parameters)


def tensor_bytes(shape: tuple[int, ...], type: str) -> int:
    """Bytes of a tensor of this shape (ggml's order) in a type whose blocks divide its rows."""
    return prod(shape) // BLOCKS[type].block_size * BLOCKS[type].block_bytes


def padded_bytes(shape: tuple[int, ...], type: str) -> int:
    """`tensor_bytes` with the padding after it in a file."""
    return -(-tensor_bytes(shape, type) // FILE_ALIGNMENT) * FILE_ALIGNMENT


def header_bytes(file: ModelFile) -> int:
    """The most that the header of a file quantized from `file` takes."""
    starts: dict[int, int] = {}
    for tensor in file.tensors:
        starts[tensor.part] = min(tensor.offset, starts.get(tensor.part, tensor.offset))
    return sum(starts.values()) + HEADER_ALLOWANCE


def quantized_bytes(file: ModelFile, types: Mapping[str, str]) -> int:
    """The most that a file quantized from `file` takes, with these types of its tensors."""
    return header_bytes(file) + sum(padded_bytes(tensor.shape, types[tensor.name]) for tensor in file.tensors)
