"""Literal GGUF bytes for the tests, right or wrong, and the verdict of stock llama.cpp on a file."""

import ctypes
import os
import struct
from functools import cache
from pathlib import Path

import pytest

U32, I32, FLOAT, STRING, ARRAY = 4, 5, 6, 8, 9
F32, Q4_0 = 0, 2


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


def u32(name: bytes, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def f32(name: bytes, value: float) -> bytes:
    return key(name, FLOAT, struct.pack("<f", value))


def array(name: bytes, element_type: int, length: int, elements: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", element_type, length) + elements)


def tensor(name: bytes, shape: tuple[int, ...], offset: int = 0, type_number: int = F32) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", type_number, offset)


ARCHITECTURE = key(b"general.architecture", STRING, string(b"llama"))


def gguf(
    keys: list[bytes] = (ARCHITECTURE,),
    tensors: list[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. The counts say the truth unless they are given."""
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def data_folder() -> Path:
    """The folder of real models, or a skip."""
    folder = os.environ.get("EDGEINFER_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EDGEINFER_TEST_DATA does not name the folder of real models")
    return Path(folder)


@cache
def libggml() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@cache
def _libgguf() -> ctypes.CDLL:
    lib, pointer, index = libggml(), ctypes.c_void_p, ctypes.c_int64
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_init_from_file.restype = pointer
    lib.gguf_free.argtypes = [pointer]
    results = {
        "gguf_get_n_kv": index,
        "gguf_get_key": ctypes.c_char_p,
        "gguf_get_kv_type": ctypes.c_int,
        "gguf_get_arr_type": ctypes.c_int,
        "gguf_get_arr_n": ctypes.c_size_t,
        "gguf_get_n_tensors": index,
        "gguf_get_tensor_name": ctypes.c_char_p,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_tensor_size": ctypes.c_size_t,
        "gguf_get_data_offset": ctypes.c_size_t,
    }
    for name, result in results.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = (
            [pointer] if name.endswith(("n_kv", "n_tensors", "data_offset")) else [pointer, index]
        )
    lib.gguf_type_name.restype = ctypes.c_char_p
    return lib


def stock_accepts(path: Path) -> bool:
    """Whether llama.cpp's own GGUF reader accepts the file's header."""
    lib = _libgguf()
    context = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    lib.gguf_free(context)
    return context is not None


def stock_contents(path: Path) -> tuple[list[tuple], list[tuple]]:
    """What llama.cpp reads: (key, type, array length or None) and (tensor, absolute offset, bytes)."""
    lib = _libgguf()
    file = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    keys, tensors = [], []
    for i in range(lib.gguf_get_n_kv(file)):
        is_array = lib.gguf_get_kv_type(file, i) == ARRAY
        number = lib.gguf_get_arr_type(file, i) if is_array else lib.gguf_get_kv_type(file, i)
        length = lib.gguf_get_arr_n(file, i) if is_array else None
        keys.append((lib.gguf_get_key(file, i).decode(), lib.gguf_type_name(number).decode(), length))
    for i in range(lib.gguf_get_n_tensors(file)):
        offset = lib.gguf_get_data_offset(file) + lib.gguf_get_tensor_offset(file, i)
        tensors.append(
            (lib.gguf_get_tensor_name(file, i).decode(), offset, lib.gguf_get_tensor_size(file, i))
        )
    lib.gguf_free(file)
    return keys, tensors
