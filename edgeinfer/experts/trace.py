"""The trace file: which experts each token used in each layer, and what the next layer's gate had predicted.

A zip of numpy arrays (.npz), compressed, without pickled objects:

    header        uint8     JSON: format, version, model, architecture, fingerprint, num_experts
    routed        int16     (tokens, layers, used): expert ids, -1 behind them where a layer uses fewer; none
                            where a layer was not computed for a token of the prompt, as the last is not
    decode        bool      (tokens,): False for tokens of a prompt
    expert_bytes  int64     (layers,): gate, up and down slices of one expert
    predicted     int16     (tokens, layers, ranked), optional: the experts that the gate of layer l ranked
                            first when it was given the gate input of layer l-1, the best first; -1: none

Only layers with experts count. Reading is strict: an array of another type, shape or range is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edgeinfer.errors import TraceError
from edgeinfer.modelfile import ModelFile

FORMAT = "edgeinfer-trace"
VERSION = 1
MAX_EXPERTS = 1 << 14
_MAX_MEMBER_BYTES = 2 << 30
_TEXTS = ("model", "architecture", "fingerprint")
_ARRAYS = {"routed": (np.int16, 3), "decode": (np.bool_, 1), "expert_bytes": (np.int64, 1)}
_PREDICTED = {"predicted": (np.int16, 3)}
_RECORD_AGAIN = "Record it again with `edgeinfer trace`."


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded routing; arrays as the module describes them. TraceError where they do not fit together."""

    model: str
    architecture: str
    fingerprint: str
    num_experts: int
    routed: np.ndarray
    decode: np.ndarray
    expert_bytes: np.ndarray
    predicted: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, (dtype, ndim) in _ARRAYS.items():
            _check_array(name, getattr(self, name), dtype, ndim)
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise TraceError(f"Expected 1 to {MAX_EXPERTS} experts in a layer, found {self.num_experts}.")
        tokens, layers, used = self.routed.shape
        if not (tokens and layers and used):
            raise TraceError(
                f"Expected at least one token, layer and expert, found routed of shape {self.routed.shape}."
            )
        _check_shape("decode", self.decode, (tokens,))
        _check_shape("expert_bytes", self.expert_bytes, (layers,))
        if self.expert_bytes.min() < 1:
            raise TraceError(f"Expected experts of at least one byte, found {self.expert_bytes.min()}.")
        _check_ids("routed", self.routed, self.num_experts)
        missing = (self.routed[:, :, 0] < 0) & self.decode[:, None]
        if missing.any():
            token, layer = np.argwhere(missing)[0]
            raise TraceError(
                f"Expected an expert for every decoded token and layer, found none for {token}, {layer}."
            )
        if not (self.routed >= 0).any():
            raise TraceError("Expected routed experts, found none.")
        if self.predicted is not None:
            _check_array("predicted", self.predicted, *_PREDICTED["predicted"])
            _check_shape("predicted", self.predicted, (tokens, layers, self.predicted.shape[2]))
            _check_ids("predicted", self.predicted, self.num_experts)

    @property
    def num_tokens(self) -> int:
        return self.routed.shape[0]

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return self.routed.shape[1]

    @property
    def num_used(self) -> int:
        """Experts that a token uses in a layer; the most, where layers differ."""
        return self.routed.shape[2]

    @property
    def num_keys(self) -> int:
        """Experts of all layers."""
        return self.num_layers * self.num_experts

    def check_model(self, model: ModelFile) -> None:
        """TraceError unless the trace was recorded with this model file."""
        found = model_fingerprint(model)
        if found != self.fingerprint:
            raise TraceError(
                f"The trace was recorded with {self.model} ({self.architecture}, fingerprint "
                f"{self.fingerprint[:12]}), but {model.paths[0]} is {model.name} ({model.architecture}, "
                f"fingerprint {found[:12]}). "
                "Give the model that it was recorded with, or record this one with `edgeinfer trace`."
            )

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all. TraceError where it cannot be written."""
        header = {"format": FORMAT, "version": VERSION, "num_experts": self.num_experts}
        header |= {name: getattr(self, name) for name in _TEXTS}
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        arrays |= {name: getattr(self, name) for name in _ARRAYS}
        if self.predicted is not None:
            arrays["predicted"] = self.predicted
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "xb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(partial, path)
        except OSError as error:
            raise TraceError(f"The trace {path} cannot be written: {error.strerror or error}.") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Trace:
        """The trace in a file. TraceError where it is no trace, is cut short, or does not add up."""
        try:
            return cls(**_read_members(Path(path)))
        except TraceError as error:
            raise TraceError(f"{path} cannot be used as a trace. {error} {_RECORD_AGAIN}") from error


def model_fingerprint(model: ModelFile) -> str:
    """SHA-256 (hexadecimal) of what the file says it holds: architecture, sizes, tensors and their places.

    Weights are not read: fine-tuned weights of the same layout have the same fingerprint.
    """
    tensors = [(t.name, t.type, t.shape, t.part, t.offset) for t in model.tensors]
    layout = json.dumps([model.architecture, model.part_bytes, tensors])
    return hashlib.sha256(layout.encode()).hexdigest()


def _check_array(name: str, array: np.ndarray, dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        found = f"{array.dtype} with {array.ndim}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TraceError(f"Expected {name} as {np.dtype(dtype)} with {ndim} dimensions, found {found}.")


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise TraceError(f"Expected {name} of shape {shape} to fit the routed experts, found {array.shape}.")


def _check_ids(name: str, ids: np.ndarray, num_experts: int) -> None:
    """Ids below num_experts, none twice in a row, and -1 only behind them."""
    if ids.size == 0:
        return
    if ids.min() < -1 or ids.max() >= num_experts:
        wrong = ids.min() if ids.min() < -1 else ids.max()
        raise TraceError(f"Expected {name} experts from 0 to {num_experts - 1} (-1: none), found {wrong}.")
    if ((ids[..., :-1] < 0) & (ids[..., 1:] >= 0)).any():
        raise TraceError(
            f"Expected -1 only behind the {name} experts of a token and layer, found it before one."
        )
    ordered = np.sort(ids, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise TraceError(f"Expected different {name} experts for a token and layer, found one twice.")


def _read_members(path: Path) -> dict:
    """The arguments of Trace."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start[:2] != b"PK":
                raise TraceError(f"Expected a trace (an .npz file), found a file that starts with {start!r}.")
            with zipfile.ZipFile(file) as members:
                return _read_arrays(members)
    except zipfile.BadZipFile as error:
        raise TraceError(f"The file is cut short or damaged ({error}).") from error
    except (zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
        raise TraceError(f"The file is damaged ({str(error)[:200]}).") from error
    except OSError as error:
        raise TraceError(f"The file cannot be read: {error.strerror or error}.") from error


def _read_arrays(members: zipfile.ZipFile) -> dict:
    names = sorted(members.namelist())
    required = sorted(f"{name}.npy" for name in ("header", *_ARRAYS))
    if names not in (required, sorted([*required, "predicted.npy"])):
        raise TraceError(
            f"Expected the arrays {', '.join(required)} and perhaps predicted.npy, "
            f"found {', '.join(names[:9])[:200]}."
        )
    values = _read_header(_read_array(members, "header", np.uint8, 1))
    arrays = _ARRAYS | (_PREDICTED if "predicted.npy" in names else {})
    return values | {name: _read_array(members, name, *kind) for name, kind in arrays.items()}


def _read_array(members: zipfile.ZipFile, name: str, dtype: type, ndim: int) -> np.ndarray:
    """Checks what the array says of itself before memory is taken for it."""
    size = members.getinfo(f"{name}.npy").file_size
    if size > _MAX_MEMBER_BYTES:
        raise TraceError(f"Expected at most {_MAX_MEMBER_BYTES} bytes of {name}, found {size}.")
    with members.open(f"{name}.npy") as file:
        shape, found, start = _array_header(file)
        if found != dtype or len(shape) != ndim:
            raise TraceError(
                f"Expected {name} as {np.dtype(dtype)} with {ndim} dimensions, "
                f"found {found} with {len(shape)}."
            )
        expected = start + int(np.prod(shape, dtype=object)) * found.itemsize
        if size != expected:
            raise TraceError(f"Expected {expected} bytes of {name} for its shape {shape}, found {size}.")
    with members.open(f"{name}.npy") as file:
        return np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False))


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type, bytes of the header)."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise TraceError(f"Expected numpy arrays of version 1 or 2, found {version}.")
    return shape, dtype, file.tell()


def _read_header(header: np.ndarray) -> dict:
    try:
        values = json.loads(header.tobytes())
    except RecursionError as error:
        raise TraceError("The header is nested too deeply.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TraceError(f'Expected a header with the format "{FORMAT}", found another one.')
    if values.get("version") != VERSION:
        raise TraceError(
            f"Expected trace version {VERSION}, found {str(values.get('version'))[:20]}: "
            "another edgeinfer wrote it."
        )
    del values["format"], values["version"]
    if set(values) != {*_TEXTS, "num_experts"}:
        raise TraceError(
            f"Expected {', '.join((*_TEXTS, 'num_experts'))} in the header, found {sorted(values)}."
        )
    if not all(isinstance(values[name], str) for name in _TEXTS) or type(values["num_experts"]) is not int:
        raise TraceError(f"Expected texts and a number of experts in the header, found {str(values)[:200]}.")
    return values
