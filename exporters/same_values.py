"""Whether two tensors of a checkpoint hold the same numbers, read a few megabytes at a time."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from edgeinfer.errors import ModelFileError
from edgeinfer.exporters.aligned_file import PAGE, AlignedBuffer, SourceFile
from edgeinfer.exporters.conversion import STORAGE, to_float32
from edgeinfer.exporters.safetensors_file import ITEM_BYTES, TensorRecord

_ELEMENTS = 1 << 19  # at once


def same_values(one: TensorRecord, other: TensorRecord) -> bool:
    """False also where the shapes differ or one holds no floats; each is compared as float32.

    Raises ModelFileError where one cannot be read.
    """
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORAGE.keys():
        return False
    with closing(_Reader(one)) as left, closing(_Reader(other)) as right:
        return all(
            np.array_equal(left.floats(first), right.floats(first))
            for first in range(0, one.num_elements, _ELEMENTS)
        )


class _Reader:
    def __init__(self, record: TensorRecord):
        self._record = record
        self._buffer = AlignedBuffer(_ELEMENTS * ITEM_BYTES[record.dtype] + 2 * PAGE)
        self._file = SourceFile(record.path)

    def floats(self, first: int) -> np.ndarray:
        """float32 (up to _ELEMENTS) from element `first` on, valid until the next call."""
        record, item = self._record, ITEM_BYTES[self._record.dtype]
        count = min(_ELEMENTS, record.num_elements - first)
        try:
            found = self._file.read(record.offset + first * item, count * item, self._buffer)
        except OSError as error:
            raise ModelFileError(f"{record.path}: cannot be read: {error.strerror}.") from error
        return to_float32(np.frombuffer(found, STORAGE[record.dtype]), record.dtype)

    def close(self) -> None:
        self._file.close()
