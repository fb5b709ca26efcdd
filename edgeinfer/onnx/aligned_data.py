"""The data file of a stage with every part at a page.

ONNX Runtime writes rearranged weights one behind the other, wherever the last one ends. But a kernel may
have laid out what is in them by the address of its memory (4 and 8 bits: from the next multiple of 64 bytes
on), and computes nonsense where the file is mapped at another one.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

from edgeinfer.onnx.optimize import all_tensors

_KERNELS_WANT = 64  # bytes: memory of ONNX Runtime begins at multiples of it
_COPIED_BYTES = 4 << 20
_Part = tuple[int, int]  # offset, bytes


def align_data(model_path: Path, data_path: Path) -> None:
    """Move what lies at odd places, and let the model refer to the new ones; nothing where all lies well."""
    if not data_path.exists():
        return
    model = onnx.load(model_path, load_external_data=False)
    tensors = [tensor for tensor in all_tensors(model.graph) if tensor.external_data]
    parts = sorted({part for tensor in tensors for part in data_parts(tensor)})
    if all(offset % _KERNELS_WANT == 0 for offset, _ in parts):
        return
    places, end = {}, 0
    for part in parts:
        places[part] = end
        end += -(-part[1] // mmap.PAGESIZE) * mmap.PAGESIZE
    _copy(data_path, places, end)
    for tensor in tensors:
        _refer(tensor, places)
    model_path.write_bytes(model.SerializeToString())


def data_parts(tensor: onnx.TensorProto) -> Iterator[_Part]:
    """Where the tensor's own bytes lie in its data file, then each part of its rearranged forms.

    ONNX Runtime notes the latter as "kernel|offset;bytes;padding|offset;..." (prepacked_weights in
    tensor_external_data_info.cc of its source).
    """
    values = {entry.key: entry.value for entry in tensor.external_data}
    yield int(values.get("offset", 0)), int(values["length"])
    for key, value in values.items():
        if key.startswith("prepacked"):
            for part in value.split("|")[1:]:
                offset, nbytes = part.split(";")[:2]
                yield int(offset), int(nbytes)


def _refer(tensor: onnx.TensorProto, places: dict[_Part, int]) -> None:
    own, *_ = data_parts(tensor)
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(places[own])
        elif entry.key.startswith("prepacked"):
            kernel, *parts = entry.value.split("|")
            moved = []
            for part in parts:
                offset, nbytes, *rest = part.split(";")
                moved.append(";".join([str(places[int(offset), int(nbytes)]), nbytes, *rest]))
            entry.value = "|".join([kernel, *moved])


def _copy(path: Path, places: dict[_Part, int], size: int) -> None:
    beside = path.with_name(f"{path.name}.aligned")
    with open(path, "rb") as source, open(beside, "wb") as target:
        for (offset, nbytes), place in places.items():
            source.seek(offset)
            target.seek(place)
            copy_bytes(source, nbytes, target)
        target.truncate(size)
    shutil.copymode(path, beside)
    os.replace(beside, path)


def copy_bytes(source: BinaryIO, nbytes: int, target: BinaryIO) -> None:
    """From where `source` is to where `target` is, some megabytes at a time."""
    for start in range(0, nbytes, _COPIED_BYTES):
        target.write(source.read(min(_COPIED_BYTES, nbytes - start)))
