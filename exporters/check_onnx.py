"""An ONNX model that is checked: inputs made for it, its outputs by ONNX Runtime, its precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto

from edgeinfer.errors import ExportError
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.ports import Port, check_feeds, make_port, show_shape
from edgeinfer.onnx.runtime import explained, make_session, session_options
from edgeinfer.streams.state import find_state, zero_state
from edgeinfer.system import default_threads

#: Operators whose weights or inputs are integers that stand for real numbers.
_QUANTIZED = ("MatMulNBits", "MatMulInteger", "ConvInteger", "GatherBlockQuantized", "MatMulIntegerToFloat")
_QUANTIZED_STARTS = (
    "QLinear",
    "QAttention",
    "QGemm",
    "QMoE",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantize",
)
# Of what may vary: lengths; colours, height and width of pictures
_SIZE, _CHANNELS, _IMAGE_SIZE = 8, 3, 64
_SIZES = (_SIZE, 64, 256, 512, 1024, 4096)  # a model of sound wants a window of it at least
#: Through these an index stays the index that it is.
_PASSES_ON = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")


class OnnxModel:
    """See check.py for what a model gives."""

    runtime = "ONNX Runtime"

    def __init__(self, path: Path):
        self.path = path
        self.file = read_onnx(path)
        self._session: ort.InferenceSession | None = None

    @property
    def precision(self) -> str | None:
        names = {name for _, name in self.file.operators}
        if names & {*_QUANTIZED} or any(name.startswith(_QUANTIZED_STARTS) for name in names):
            return None
        types = {tensor.type for tensor in self.file.tensors}
        return "BF16" if "bfloat16" in types else "F16" if "float16" in types else "F32"

    def open(self) -> None:
        with explained(self.path, ExportError):
            options = session_options(default_threads())
            self._session = make_session(str(self.path), options)

    def close(self) -> None:
        self._session = None

    @property
    def inputs(self) -> list[Port]:
        return [make_port(port.name, port.type, port.shape) for port in self._session.get_inputs()]

    @property
    def _outputs(self) -> list[Port]:
        return [make_port(port.name, port.type, port.shape) for port in self._session.get_outputs()]

    @property
    def output_names(self) -> list[str]:
        return [port.name for port in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output. Feeds are cast to the types that the inputs have here."""
        types = {port.name: port.dtype for port in self.inputs}
        cast = {name: np.asarray(value).astype(types.get(name, value.dtype)) for name, value in feeds.items()}
        checked = check_feeds(self.inputs, cast)
        shapes = ", ".join(f"{name} {show_shape(value.shape)}" for name, value in checked.items())
        try:
            with explained(self.path, ExportError):
                found = self._session.run(None, checked)
        except ExportError as error:
            raise ExportError(f"{error} (inputs: {shapes}). Give inputs that it takes.") from error
        return dict(zip(self.output_names, found))

    def made_inputs(self, seed: int = 0, size: int = _SIZE) -> dict[str, np.ndarray]:
        """Inputs of the declared shapes and types: the same random numbers every time, indices in their
        table's range. Lengths that may vary are `size`.
        """
        rows = _rows_looked_up(ModelProto.FromString(self.file.skeleton).graph)
        rng = np.random.default_rng(seed)
        state = find_state(self.inputs, self._outputs, {})
        return {
            port.name: _made(port, rng, rows.get(port.name), size, port.name in state) for port in self.inputs
        }

    def fitting_inputs(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(inputs, outputs) of the shortest made inputs that the model takes. ExportError: it takes none."""
        problem = None
        for size in _SIZES:
            feeds = self.made_inputs(size=size)
            try:
                return feeds, self.run(feeds)
            except ExportError as error:
                problem = problem or error
        raise ExportError(f"{problem} A .npz file or a folder of them can be given with --calibration.")

    @property
    def reads_text(self) -> bool:
        return any(port.name == "input_ids" for port in self.inputs)

    def token_inputs(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Feeds for one sequence and an empty cache, by the names that exporters give to inputs."""
        count = len(tokens)
        known = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, count)),
            "position_ids": np.arange(count)[None],
            "token_type_ids": np.zeros((1, count)),
        }
        return {
            port.name: (known[port.name] if port.name in known else _empty_cache(port)).astype(port.dtype)
            for port in self.inputs
        }


def _empty_cache(port: Port) -> np.ndarray:
    """One sequence of no tokens: a size that may vary is 1 for the batch and 0 for the past."""
    sizes = [
        size if isinstance(size, int) else 1 if axis == 0 or "batch" in str(size) else 0
        for axis, size in enumerate(port.shape)
    ]
    return np.zeros(sizes)


def _made(port: Port, rng: np.random.Generator, rows: int | None, length: int, is_state: bool) -> np.ndarray:
    shape = [_size(size, axis, len(port.shape), length) for axis, size in enumerate(port.shape)]
    if is_state:  # what varies is the batch, or tokens that are past
        shape = list(zero_state(port).shape)
    if port.dtype.kind == "f":
        return rng.standard_normal(shape).astype(port.dtype)
    if port.dtype.kind == "b" or "mask" in port.name:
        return np.ones(shape, port.dtype)
    if port.dtype.kind in "iu":
        return rng.integers(0, rows or 2, shape).astype(port.dtype)
    raise ExportError(
        f"No {port.type_name} can be made for the input {port.name!r}. Give the inputs yourself."
    )


def _size(size: int | str | None, axis: int, rank: int, length: int) -> int:
    """A size for one that may vary. "past + now" is the sum of both."""
    if isinstance(size, int) and size > 0:
        return size
    if isinstance(size, str) and "+" in size:
        parts = [part.strip() for part in size.split("+")]
        return sum(int(part) if part.isdigit() else _size(part, axis, rank, length) for part in parts)
    name = str(size or "").lower()
    if "past" in name:
        return 0
    if "batch" in name or axis == 0:
        return 1
    if rank == 4:
        return _CHANNELS if axis == 1 else _IMAGE_SIZE
    return length


def _rows_looked_up(graph: GraphProto) -> dict[str, int]:
    """Input -> rows of the smallest table that it is an index into."""
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    comes_from = {port.name: port.name for port in graph.input}
    rows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _PASSES_ON and node.input and node.input[0] in comes_from:
            comes_from[node.output[0]] = comes_from[node.input[0]]
        elif node.op_type in ("Gather", "GatherBlockQuantized") and len(node.input) > 1:
            name = comes_from.get(node.input[1])
            if name is not None and node.input[0] in tables:
                rows[name] = min(tables[node.input[0]], rows.get(name, 1 << 62))
    return rows
