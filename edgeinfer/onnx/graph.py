"""What is in an ONNX file, read without its weights: tensors and where they lie, operators, inputs and
outputs.

Also its skeleton: the same model with the bytes of large tensors left in the file, so that gigabytes need no
memory.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import ModelFileError
from edgeinfer.onnx.tensors import TYPES, Folder, StoredTensor, read_tensor, text
from edgeinfer.onnx.wire import BYTES, VARINT, Field, WireError, encode, encode_number, fields, signed

LARGE_BYTES = 16 << 10  # tensors from this size on are left in the file
MOST_DEPTH = 60  # graphs within graphs; protobuf itself stops at 100 messages

#: What files that are no model often start with, and what to do about each.
_NO_MODELS = (
    (
        b"version https://git-lfs",
        "It is a Git LFS pointer, not the model: fetch the model with `git lfs pull`.",
    ),
    (b"<", "It looks like a web page, perhaps an error page saved by a download: download the model again."),
    (b"GGUF", "It is a GGUF model: streams and --input are for ONNX models."),
)

#: Of each message the fields that lead to tensors: number -> what is in it.
_INSIDE = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model file and the files of its external data; nothing of the weights is in memory."""

    path: Path
    paths: tuple[Path, ...]  # all files, the model first
    ir_version: int
    producer: str
    opsets: Mapping[str, int]  # domain -> version
    operators: Mapping[tuple[str, str], int]  # (domain, name) -> how many, also in subgraphs
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]
    inputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]  # (name, type, shape)
    outputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]
    skeleton: bytes  # a ModelProto whose large tensors are external data of `paths`

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def num_parameters(self) -> int:
        """Elements of tensors of real numbers, and of quantized ones; not of integers that are indices or
        shapes.
        """
        return sum(
            tensor.num_elements for tensor in self.tensors if tensor.type not in ("int64", "int32", "string")
        )


def read_onnx(path: str | os.PathLike, data_of: str | os.PathLike | None = None) -> OnnxFile:
    """Read and check the model at `path`. Raises ModelFileError for what is missing, malformed, or not ONNX.

    `data_of`: the model beside which its external data lies, where that is not `path` itself.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(f"{path} is empty: expected an ONNX model.")
            # Unmapped when its last view goes: an error keeps views, with which it cannot be closed.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return _Reader(path, data, Path(data_of or path)).read()
    except WireError as error:
        start = bytes(data[:64])
        hint = next((hint for magic, hint in _NO_MODELS if start.startswith(magic)), "Download it again.")
        raise ModelFileError(
            f"{path} is not an ONNX model, or is damaged: found {error}. Expected a protobuf message. {hint}"
        ) from error
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder: expected an .onnx file.") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


class _Reader:
    def __init__(self, path: Path, data: memoryview, data_of: Path):
        self._path = path
        self._data = data
        self._locate = Folder(data_of).locate
        self._tensors: list[StoredTensor] = []
        self._operators: Counter[tuple[str, str]] = Counter()
        self._opsets: dict[str, int] = {}
        self._metadata: dict[str, str] = {}
        self._ports: dict[int, list] = {11: [], 12: []}
        self._numbers = {1: 0}
        self._texts = {2: ""}
        self._has_graph = False

    def read(self) -> OnnxFile:
        skeleton = self._rewrite("model", 0, len(self._data), 0)
        if not self._has_graph or not self._opsets:
            raise ModelFileError(
                f"{self._path} is not an ONNX model: expected a graph and its operator sets, found none."
            )
        initialized = {tensor.name for tensor in self._tensors}
        others = {tensor.path for tensor in self._tensors} - {self._path}
        return OnnxFile(
            path=self._path,
            paths=(self._path, *sorted(others)),
            ir_version=self._numbers[1],
            producer=self._texts[2],
            opsets=self._opsets,
            operators=self._operators,
            metadata=self._metadata,
            tensors=tuple(self._tensors),
            inputs=tuple(port for port in self._ports[11] if port[0] not in initialized),
            outputs=tuple(self._ports[12]),
            skeleton=skeleton,
        )

    def _rewrite(self, kind: str, start: int, end: int, depth: int) -> bytes:
        """The message with large tensors made external. What is in it is noted on the way."""
        if depth > 3 * MOST_DEPTH:
            raise ModelFileError(
                f"{self._path} is not opened: its graphs lie more than {MOST_DEPTH} deep in each other."
            )
        parts, copied = [], start
        operator, domain = "", ""
        for field in fields(self._data, start, end):
            inside = _INSIDE[kind].get(field.number) if field.kind == BYTES else None
            if inside is None:
                if kind == "node" and field.kind == BYTES and field.number == 4:
                    operator = text(self._data, field)
                elif kind == "node" and field.kind == BYTES and field.number == 7:
                    domain = text(self._data, field)
                elif kind == "model":
                    self._note_model(field)
                elif kind == "graph" and depth == 1 and field.number in self._ports:
                    self._ports[field.number].append(_read_port(self._data, field))
                continue
            if inside == "tensor":
                new = self._tensor(field)
            else:
                new = self._rewrite(inside, field.start, field.end, depth + 1)
                if len(new) == field.end - field.start:  # nothing in it was large
                    new = None
            if new is not None:
                parts += [self._data[copied : field.begins], encode(field.number, new)]
                copied = field.end
        if kind == "node":
            self._operators[domain, operator] += 1
        self._has_graph |= kind == "graph"
        return b"".join([*parts, self._data[copied:end]])

    def _tensor(self, field: Field) -> bytes | None:
        """Notes the tensor. For a large one whose bytes are in this file: its message with a reference to
        them.
        """
        tensor = read_tensor(self._data, field.start, field.end, self._path, self._locate)
        self._tensors.append(tensor)
        if field.end - field.start >= LARGE_BYTES:
            _unmap(self._data)
        if tensor.path != self._path or tensor.offset is None or tensor.nbytes < LARGE_BYTES:
            return None
        kept, copied = [], field.start
        for part in fields(self._data, field.start, field.end):
            if part.start <= tensor.offset < part.end:
                kept.append(bytes(self._data[copied : part.begins]))
                copied = part.end
        kept.append(bytes(self._data[copied : field.end]))
        entries = {"location": self._path.name, "offset": str(tensor.offset), "length": str(tensor.nbytes)}
        for key, value in entries.items():
            kept.append(encode(13, encode(1, key.encode()) + encode(2, value.encode())))
        return b"".join([*kept, encode_number(14, 1)])

    def _note_model(self, field: Field) -> None:
        data = self._data
        if field.number in self._numbers and field.kind == VARINT:
            self._numbers[field.number] = signed(field.number_value)
        elif field.number in self._texts and field.kind == BYTES:
            self._texts[field.number] = text(data, field)
        elif field.number == 8 and field.kind == BYTES:  # opset_import: domain, version
            domain, version = "", 0
            for part in fields(data, field.start, field.end):
                if part.number == 1 and part.kind == BYTES:
                    domain = text(data, part)
                elif part.number == 2 and part.kind == VARINT:
                    version = signed(part.number_value)
            self._opsets[domain] = version
        elif field.number == 14 and field.kind == BYTES:  # metadata_props
            pair = {
                part.number: text(data, part)
                for part in fields(data, field.start, field.end)
                if part.kind == BYTES
            }
            self._metadata[pair.get(1, "")] = pair.get(2, "")


def _unmap(data: memoryview) -> None:
    """Drop the mapped file's pages from this process; what is looked at again comes back.

    A touched byte may map 2 MiB of the page cache around it, so headers alone would map whole weights.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        data.obj.madvise(mmap.MADV_DONTNEED)


def _read_port(data: memoryview, field: Field) -> tuple[str, str, tuple[int | str | None, ...]]:
    """(name, type, shape) of a ValueInfoProto; the type of what is no tensor is "other"."""
    name, kind, shape = "", "other", []
    for part in fields(data, field.start, field.end):
        if part.number == 1 and part.kind == BYTES:
            name = text(data, part)
        elif part.number == 2 and part.kind == BYTES:
            for tensor in (
                f for f in fields(data, part.start, part.end) if f.number == 1 and f.kind == BYTES
            ):
                for entry in fields(data, tensor.start, tensor.end):
                    if entry.number == 1 and entry.kind == VARINT:
                        kind = TYPES.get(entry.number_value, ("other", 0))[0]
                    elif entry.number == 2 and entry.kind == BYTES:
                        dims = (
                            f
                            for f in fields(data, entry.start, entry.end)
                            if f.number == 1 and f.kind == BYTES
                        )
                        shape = [_read_size(data, dim) for dim in dims]
    return name, kind, tuple(shape)


def _read_size(data: memoryview, dim: Field) -> int | str | None:
    size: int | str | None = None
    for part in fields(data, dim.start, dim.end):
        if part.number == 1 and part.kind == VARINT:
            size = signed(part.number_value)
        elif part.number == 2 and part.kind == BYTES:
            size = text(data, part) or None
    return size
