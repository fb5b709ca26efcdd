"""Where the data of a model's tensors is; it is read piece by piece, so that it is never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgeinfer.errors import ModelFileError
from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer, SourceFile
from edgeinfer.exporters.onnx_tensors import is_external, tensor_bytes

PIECE_BYTES = 4 << 20
_REFERENCE = "#"  # begins the location of a tensor whose source is in a table, not in a file beside the model
_FIELDS = (
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "raw_data",
    "external_data",
)


@dataclass(frozen=True)
class FilePart:
    """`num_bytes` bytes from byte `offset` of the file `path`."""

    path: Path
    offset: int
    num_bytes: int

    def pieces(self) -> Iterator[memoryview]:
        """Each is overwritten by the next."""
        buffer = AlignedBuffer(min(PIECE_BYTES, self.num_bytes) + 2 * PAGE)
        for start in range(0, self.num_bytes, PIECE_BYTES):
            yield self.read(start, min(self.num_bytes - start, PIECE_BYTES), buffer)

    def read(self, start: int, size: int, buffer: AlignedBuffer) -> memoryview:
        """`size` bytes from byte `start` of the part on, in `buffer`, which has room for two pages more."""
        try:
            file = SourceFile(self.path)
            try:
                return file.read(self.offset + start, size, buffer)
            finally:
                file.close()
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class Inline:
    """Data that is in memory."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def pieces(self) -> Iterator[memoryview]:
        yield memoryview(self.data)


@dataclass(frozen=True)
class Computed:
    """Data that is made when it is written. `key`: equal for equal data, so that it is written once."""

    num_bytes: int
    make: Callable[[], Iterator[np.ndarray]] = field(compare=False)
    key: object

    def pieces(self) -> Iterator[memoryview]:
        for array in self.make():
            yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


Source = FilePart | Inline | Computed


class Weights:
    """The sources of the tensors of one model; `folder` is where the model's own external data lies."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._sources: list[Source] = []

    def source(self, tensor: TensorProto) -> Source:
        """Where the data of `tensor` comes from. ValueError for strings, which have no raw form."""
        if not is_external(tensor):
            return Inline(raw_bytes(tensor))
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place["location"]
        if location.startswith(_REFERENCE):
            return self._sources[int(location[len(_REFERENCE) :])]
        return FilePart(self.folder / location, int(place.get("offset", 0)), tensor_bytes(tensor))

    def put(self, tensor: TensorProto, source: Source) -> None:
        """From now on the data of `tensor` comes from `source`."""
        for name in _FIELDS:
            tensor.ClearField(name)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{_REFERENCE}{len(self._sources)}")
        self._sources.append(source)

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The data as an array that must not be changed; mapped where it is a part of a file."""
        if not is_external(tensor):
            return numpy_helper.to_array(tensor)
        return self.read(
            self.source(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        )

    @staticmethod
    def read(source: Source, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        if isinstance(source, FilePart) and source.num_bytes:
            return np.memmap(source.path, dtype, "r", source.offset, shape)
        data = b"".join(source.pieces())
        return np.frombuffer(data, dtype).reshape(shape)

    def embed(self, tensor: TensorProto) -> None:
        """Put the data of `tensor` into the tensor itself."""
        if is_external(tensor):
            data = b"".join(self.source(tensor).pieces())
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = data


def raw_bytes(tensor: TensorProto) -> bytes:
    """The data of a tensor that holds it itself, as `raw_data` has it. ValueError where it does not fit the
    shape.
    """
    data = tensor.raw_data if tensor.HasField("raw_data") else _packed(tensor)
    if len(data) != tensor_bytes(tensor):
        raise ValueError(
            f"expected {tensor_bytes(tensor):,} bytes for shape {list(tensor.dims)}, found {len(data):,}"
        )
    return data


def _packed(tensor: TensorProto) -> bytes:
    array = numpy_helper.to_array(tensor)
    return numpy_helper.from_array(array).raw_data


def set_place(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Let `tensor` refer to a part of the file `location`."""
    for name in _FIELDS:
        tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
