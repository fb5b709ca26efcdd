"""What each tensor of a model loses as each type: measured on a text, for the choice of bits.

A tensor's error as a type is that of its products: the squared differences of its weights, each column
weighted by its importance. What such an error does to the text is measured: the tensor is rounded in memory,
and the change of the predicted probabilities (Kullback-Leibler divergence from the unrounded model's) is
divided by the error. Small errors change them in proportion, so one measurement serves all types. SqueezeLLM
(arXiv:2306.07629) weights by the second derivative of the loss for the same reason; here no gradients are
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from edgeinfer.engines.ggml import BLOCKS
from edgeinfer.engines.gguf import GGUFEngine
from edgeinfer.exporters.importance import Importance
from edgeinfer.exporters.nodes import Node, Tap
from edgeinfer.exporters.rounding import dequantize, num_rows, quantize, row_bytes, rows_of
from edgeinfer.exporters.windows import check_context, logits_of, scoring_engine, windows
from edgeinfer.modelfile import ModelFile, TensorInfo
from edgeinfer.system import default_threads

MAX_GROUPS = 96  # tensors that are measured together, where a model has more
_SAMPLE = 1 << 15  # weights of a tensor whose error is computed
_CHUNK = 1 << 21  # weights that are rounded at once
_WORK = 5e10  # weights times tokens of one measurement
_MAX_WINDOWS = 4
_BASELINE_BYTES = 256 << 20

Losses = dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Weights:
    """The source's weights and their importance, as rounding needs them."""

    file: ModelFile
    importance: Importance
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        most = max((int(counts.max()) for counts in self.importance.counts.values()), default=1)
        object.__setattr__(self, "tokens", max(1, most))

    def rounding(self, tensor: TensorInfo, expert: int) -> np.ndarray | None:
        """(columns,) mean squares, by which quantization weights its errors."""
        if tensor.name not in self.importance.sums:
            return None
        return self.importance.of_matrix(tensor.name, expert)

    def per_token(self, tensor: TensorInfo, expert: int) -> np.ndarray | float:
        """(columns,) squares a token, over all tokens: an expert that is seldom used counts less."""
        if tensor.name not in self.importance.sums:
            return 1.0
        return self.importance.sums[tensor.name][expert] / self.tokens

    def error(self, tensor: TensorInfo, type: str) -> float:
        """Summed squared error of the products with this tensor, a token; from a sample of its rows."""
        columns, per_matrix = tensor.shape[0], tensor.shape[1]
        count = max(1, min(num_rows(tensor), _SAMPLE // columns))
        sample = np.linspace(0, num_rows(tensor) - 1, count).astype(np.int64)
        total = 0.0
        for expert in np.unique(sample // per_matrix):
            values = rows_of(self.file, tensor, sample[sample // per_matrix == expert])
            rounded = dequantize(quantize(values, type, self.rounding(tensor, expert)), type, columns)
            total += float(
                (np.square(rounded - values) * self.per_token(tensor, expert)).sum(dtype=np.float64)
            )
        return total * num_rows(tensor) / count

    def rounded(self, tensor: TensorInfo, type: str, pool: ThreadPoolExecutor) -> np.ndarray:
        """uint8 (rows, bytes of a row): the tensor in its own type after it went through `type`."""
        columns, per_matrix = tensor.shape[0], tensor.shape[1]
        result = np.empty((num_rows(tensor), row_bytes(tensor.type, columns)), np.uint8)

        def part(start: int, stop: int) -> None:
            values = rows_of(self.file, tensor, np.arange(start, stop))
            packed = quantize(values, type, self.rounding(tensor, start // per_matrix))
            result[start:stop] = quantize(dequantize(packed, type, columns), tensor.type)

        step = max(1, min(per_matrix, _CHUNK // columns))
        jobs = [
            pool.submit(part, start, min(start + step, matrix + per_matrix))
            for matrix in range(0, num_rows(tensor), per_matrix)
            for start in range(matrix, matrix + per_matrix, step)
        ]
        for job in jobs:
            job.result()
        return result


def measure_losses(
    file: ModelFile,
    candidates: Mapping[str, Sequence[str]],
    text: str,
    importance: Importance,
    bits: float,
    *,
    context: int,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Losses:
    """tensor -> type -> nats of divergence a token that it adds, for `candidates` (tensor -> types).

    Measured with the type of each tensor that is nearest to `bits` a weight. The model is mapped, not
    streamed.
    """
    threads = threads or default_threads()
    weights = _Weights(file, importance)
    tensors = {tensor.name: tensor for tensor in file.tensors if tensor.name in candidates}
    with _pool(threads) as pool:
        errors = {
            name: {type: pool.submit(weights.error, tensor, type) for type in candidates[name]}
            for name, tensor in tensors.items()
        }
        found = {name: {type: job.result() for type, job in jobs.items()} for name, jobs in errors.items()}
        probes = {name: _probe_type(found[name], bits) for name in tensors}
        groups = group_tensors(list(tensors.values()))
        rates: dict[str, float] = {}
        with _Bench(file, text, check_context(file, context), threads) as bench:
            for number, group in enumerate(groups):
                patches = {t.name: weights.rounded(t, probes[t.name], pool) for t in group}
                error = sum(found[t.name][probes[t.name]] for t in group)
                rate = bench.divergence(patches) / error if error else 0.0
                rates.update({t.name: rate for t in group})
                if progress is not None:
                    progress((number + 1) / len(groups))
    # A weight that llama.cpp reaches in another way than by its tensor cannot be exchanged: assume the worst.
    highest = max(rates.values(), default=0.0)
    rates = {name: rate or highest for name, rate in rates.items()}
    return {
        name: {type: rates[name] * error for type, error in kinds.items()} for name, kinds in found.items()
    }


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:  # after Ctrl-C, without what has not begun
        pool.shutdown(cancel_futures=True)


def _probe_type(errors: Mapping[str, float], bits: float) -> str:
    def distance(type: str) -> float:
        block = BLOCKS[type]
        return abs(block.block_bytes * 8 / block.block_size - bits)

    return min((type for type in errors if errors[type] > 0), key=distance, default=next(iter(errors)))


def group_tensors(tensors: Sequence[TensorInfo], most: int = MAX_GROUPS) -> list[list[TensorInfo]]:
    """Groups of tensors with one role in neighbouring layers, about `most` of them; of one each where that works."""
    roles: dict[str, list[TensorInfo]] = {}
    groups = [[tensor] for tensor in tensors if tensor.layer is None]
    for tensor in tensors:
        if tensor.layer is not None:
            roles.setdefault(tensor.role, []).append(tensor)
    per_role = max(1, (most - len(groups)) // max(1, len(roles)))
    for members in roles.values():
        members.sort(key=lambda tensor: tensor.layer)
        size = -(-len(members) // per_role)
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups


class _Bench:
    """The source under llama.cpp, its weights exchanged in memory, and what it predicts on the text."""

    def __init__(self, file: ModelFile, text: str, context: int, threads: int):
        self._file, self._context = file, context
        self._addresses: dict[str, int] = {}
        self._names = {tensor.name for tensor in file.tensors}
        self._tap = Tap(self._learn, lambda _node, _ids: None)
        self._opened = scoring_engine(
            file.paths[0], context=context, threads=threads, tap=self._tap, in_memory=True
        )
        self._engine: GGUFEngine | None = None
        self._text = text
        self._baseline: list[np.ndarray] = []

    def _learn(self, node: Node) -> bool:
        """Where llama.cpp keeps each weight."""
        for address in node.src:
            if address:
                name = Node.from_address(address).text_name
                if name in self._names:
                    self._addresses.setdefault(name, address)
        return False

    def __enter__(self) -> _Bench:
        self._engine = self._opened.__enter__()
        try:
            parts = windows(self._engine.model, self._text, self._context, "calibration")
            count = int(_WORK / max(1, self._file.num_parameters) / self._context)
            rows = self._context - self._context // 2
            count = min(count, _MAX_WINDOWS, _BASELINE_BYTES // (4 * rows * (self._file.vocab_size or 1)))
            step = max(1, len(parts) // max(1, count))
            self._windows = parts[::step][: max(1, count)]
            for window in self._windows:
                logits_of(self._engine, window, self._context // 2, self._keep)
            self._tap.check()
            self._tap.active = False
        except BaseException:
            self._opened.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.__exit__(*exc)

    def _keep(self, _position: int, logits: np.ndarray) -> None:
        self._baseline.append(_log_softmax(logits))

    def divergence(self, patches: Mapping[str, np.ndarray]) -> float:
        """Mean over the scored tokens, in nats, with `patches` (tensor -> bytes) in place of its weights."""
        total, seen = 0.0, 0

        def compare(_position: int, logits: np.ndarray) -> None:
            nonlocal total, seen
            before = self._baseline[seen]
            total += float((np.exp(before) * (before - _log_softmax(logits))).sum(dtype=np.float64))
            seen += 1

        with self._exchanged(patches):
            for window in self._windows:
                logits_of(self._engine, window, self._context // 2, compare)
        return max(0.0, total / seen)

    @contextmanager
    def _exchanged(self, patches: Mapping[str, np.ndarray]) -> Iterator[None]:
        nodes = {
            name: Node.from_address(self._addresses[name]) for name in patches if name in self._addresses
        }
        before = {name: node.data for name, node in nodes.items()}
        try:
            for name, node in nodes.items():
                node.data = patches[name].ctypes.data
            yield
        finally:
            for name, node in nodes.items():
                node.data = before[name]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
