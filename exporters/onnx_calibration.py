"""Inputs that show a quantizer what a model meets: .npz and .npy files, one sample or several in each."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgeinfer.errors import ExportError, InputError
from edgeinfer.onnx.ports import Port, check_feeds

_SUFFIXES = (".npz", ".npy")


class CalibrationData:
    """The samples of `path`, a file or a folder of files, as feeds for a model with these inputs.

    A .npz file has an array for each input, by its name; a .npy file is for a model with one input. An array
    with one dimension more than the input holds several samples. Files are read one at a time, in order of
    their names. Raises ExportError: no files, or files that do not fit the model.
    """

    def __init__(self, path: Path, ports: Sequence[Port]):
        self._ports = ports
        self._files = _find(path)
        self.num_samples = sum(1 for _ in self._feeds())
        if self.num_samples == 0:
            raise ExportError(
                f"{path}: the calibration data is empty. Expected one sample at least, better 100."
            )
        self._left = self._feeds()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """What onnxruntime.quantization asks for: the next sample, None at the end."""
        return next(self._left, None)

    def _feeds(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self._files:
            arrays = _read(file, self._ports)
            try:
                for feeds in self._samples(arrays):
                    _check_numbers(feeds)
                    yield check_feeds(self._ports, feeds)
            except InputError as error:
                raise ExportError(f"{file}: the calibration data does not fit the model: {error}") from error

    def _samples(self, arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        several = all(
            port.name in arrays and arrays[port.name].ndim == len(port.shape) + 1 for port in self._ports
        )
        if not several:
            yield arrays
            return
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"the arrays hold different numbers of samples: {counts}.")
        for i in range(next(iter(counts.values()))):
            yield {name: array[i] for name, array in arrays.items()}


def _check_numbers(feeds: dict[str, np.ndarray]) -> None:
    """That there is something to learn a range from."""
    if not any(array.size for array in feeds.values()):
        raise InputError("a sample has no numbers in it.")
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"a sample of {name!r} has infinite numbers, or what is no number (NaN).")


def _find(path: Path) -> list[Path]:
    if path.is_file() and path.suffix in _SUFFIXES:
        return [path]
    files = sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES) if path.is_dir() else []
    if not files:
        found = (
            "it has none"
            if path.is_dir()
            else "that is another kind of file"
            if path.exists()
            else "nothing is there"
        )
        raise ExportError(
            f"{path}: expected calibration data, a .npz or .npy file or a folder of them; {found}."
        )
    return files


def _read(file: Path, ports: Sequence[Port]) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(file, allow_pickle=False, mmap_mode="r" if file.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return {_only(file, ports).name: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ExportError(
            f"{file}: the calibration data cannot be read: {error}. Write it with numpy.save or numpy.savez, "
            "without Python objects."
        ) from error


def _only(file: Path, ports: Sequence[Port]) -> Port:
    if len(ports) != 1:
        names = ", ".join(port.name for port in ports)
        raise ExportError(
            f"{file}: holds one array, but the model has the inputs {names}. Use a .npz with these names."
        )
    return ports[0]
