"""The importance matrix: how strongly a text drives each input column of each weight.

A column's importance is the mean square of the activations that it is multiplied by, so that quantization
rounds where it matters least. Gathered while llama.cpp computes the text; kept in the GGUF form of
llama-imatrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.nodes import Node, Tap, operations, values
from edgeinfer.exporters.windows import CONTEXT, check_context, scoring_engine, windows
from edgeinfer.gguf_header import GGUFArray, TensorRecord, read_header
from edgeinfer.modelfile import ModelFile, read_model_file

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """`sums`: tensor -> float32 (matrices, columns), sums of squared activations; `counts`: tensor -> int64
    (matrices,), how many vectors each matrix was multiplied by. `matrices` are the experts of a tensor that
    holds experts, else 1.

    `chunks` windows of `chunk_tokens` tokens were read; `origin` names the file or text in messages.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    chunks: int
    chunk_tokens: int
    origin: str

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk_tokens

    def weights(self, name: str) -> np.ndarray:
        """float32 (matrices * columns,): mean squares, as llama_model_quantize takes them; 1 for unused experts."""
        return np.concatenate([self.of_matrix(name, matrix) for matrix in range(len(self.sums[name]))])

    def of_matrix(self, name: str, matrix: int) -> np.ndarray:
        """float32 (columns,): the part of `weights` that is for one matrix."""
        count = self.counts[name][matrix]
        sums = self.sums[name][matrix]
        return (sums / count).astype(np.float32) if count else np.ones(len(sums), np.float32)

    def unused_experts(self) -> int:
        """Experts that the text never reached, in all tensors that hold experts."""
        return sum(int((counts == 0).sum()) for counts in self.counts.values())

    def save(self, path: Path) -> None:
        """Write the GGUF file that llama-quantize and `load_importance` read. Needs the extra `export`."""
        gguf = _gguf_package()
        writer = gguf.GGUFWriter(path, arch="")
        writer.kv_data[0].clear()  # a matrix has no architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [self.origin])
        writer.add_uint32("imatrix.chunk_count", self.chunks)
        writer.add_uint32("imatrix.chunk_size", self.chunk_tokens)
        for name in sorted(self.sums):
            writer.add_tensor(name + _SUMS, self.sums[name])
            writer.add_tensor(name + _COUNTS, self.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf_package():
    try:
        import gguf
    except ImportError:
        raise ExportError(
            'Keeping an importance matrix needs the gguf package: pip install "edgeinfer[export]"'
        ) from None
    return gguf


def load_importance(path: str | os.PathLike) -> Importance:
    """Read a GGUF importance matrix, of edgeinfer or llama-imatrix. Raises ModelFileError, ExportError."""
    _refuse_old_form(path)
    header = read_header(path)
    records = {record.name: record for record in header.tensors}
    names = [name.removesuffix(_SUMS) for name in records if name.endswith(_SUMS)]
    if header.metadata.get("general.type") != "imatrix" or not names:
        raise ExportError(
            f"{path} is no importance matrix: expected a GGUF file of type 'imatrix' with tensors named *{_SUMS}. "
            "Gather one with --calibration."
        )
    sums, counts = {}, {}
    for name in names:
        if name + _COUNTS not in records:
            raise ExportError(f"{path}: has {name}{_SUMS}, but no {name}{_COUNTS}. Gather the matrix again.")
        count = _read(path, records[name + _COUNTS])
        total = _read(path, records[name + _SUMS])
        if total.size % count.size:
            raise ExportError(
                f"{path}: {name} has {total.size} sums for {count.size} matrices. Gather the matrix again."
            )
        if not (
            np.isfinite(total).all()
            and np.isfinite(count).all()
            and (total >= 0).all()
            and (count >= 0).all()
        ):
            raise ExportError(
                f"{path}: the sums of {name} are not all finite and positive. Gather the matrix again."
            )
        sums[name], counts[name] = total.reshape(count.size, -1), np.rint(count).astype(np.int64)
    return Importance(
        sums,
        counts,
        chunks=_number(header.metadata.get("imatrix.chunk_count")),
        chunk_tokens=_number(header.metadata.get("imatrix.chunk_size")),
        origin=Path(path).name,
    )


def _refuse_old_form(path: str | os.PathLike) -> None:
    """llama-imatrix wrote another format before: a count of entries, then length and name of the first."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return  # read_header says it better
    length = int.from_bytes(start[4:8], "little")
    if start[:4] != b"GGUF" and 8 < length < 64 and start[8:12] in (b"blk.", b"outp", b"toke"):
        raise ExportError(
            f"{path} is an importance matrix in llama.cpp's old form. Convert it: llama-imatrix --in-file {path} -o "
            "NEW.gguf, or gather one with --calibration."
        )


def _read(path: str | os.PathLike, record: TensorRecord) -> np.ndarray:
    if record.type != "F32":
        raise ExportError(f"{path}: {record.name} is {record.type}, expected F32. Gather the matrix again.")
    return np.fromfile(path, "<f4", prod(record.shape), offset=record.offset)


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, GGUFArray) and value > 0 else 0


Sums = dict[str, tuple[np.ndarray, np.ndarray]]


class _Collector:
    """Adds up what the products of a model's matrices are given; a pass counts once it is done."""

    def __init__(self, file: ModelFile):
        #: Matrices in each tensor: the graph's own tensor may stand for a pool of some of its experts.
        self._matrices = {t.name: t.shape[2:] for t in file.tensors if len(t.shape) > 1}
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.begin_pass()

    def begin_pass(self) -> None:
        self._pass: Sums = {}
        self._last: tuple[int, np.ndarray] | None = (
            None  # query, key and value share their input, gate and up too
        )

    def end_pass(self) -> None:
        for name, (sums, counts) in self._pass.items():
            if name in self.sums:
                self.sums[name] += sums
                self.counts[name] += counts
            else:
                self.sums[name], self.counts[name] = sums, counts
        self.begin_pass()

    def wants(self, node: Node) -> bool:
        if node.op not in (operations().mul_mat, operations().mul_mat_id):
            return False
        return node.source(0).text_name in self._matrices and node.source(1).is_float32

    def visit(self, node: Node, ids: Node | None) -> None:
        name, vectors = node.source(0).text_name, node.source(1)
        count2, count3 = (*self._matrices[name], 1, 1)[:2]
        if name not in self._pass:
            sums = np.zeros((count2 * count3, vectors.ne[0]), np.float32)
            self._pass[name] = sums, np.zeros(count2 * count3, np.int64)
        sums, counts = self._pass[name]
        if node.op == operations().mul_mat_id:
            _add_routed(sums, counts, values(vectors)[0], values(ids)[0, 0])
        elif len(sums) > 1:
            _add_stacked(sums, counts, values(vectors), count2, count3)
        else:
            if self._last is None or self._last[0] != node.src[1]:
                rows = values(vectors).reshape(-1, vectors.ne[0])
                self._last = node.src[1], np.einsum("tc,tc->c", rows, rows)
            sums += self._last[1]
            counts += prod(vectors.ne[1:])


def _add_routed(sums: np.ndarray, counts: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> None:
    """`vectors`: (tokens, used or 1, columns); `ids`: (tokens, used), the experts each is multiplied by."""
    for slot in range(ids.shape[1]):
        experts = ids[:, slot]
        order = np.argsort(experts, kind="stable")
        present, starts = np.unique(experts[order], return_index=True)
        squares = np.square(vectors[order, slot % vectors.shape[1]])
        sums[present] += np.add.reduceat(squares, starts, axis=0)
        counts += np.bincount(experts, minlength=len(counts))


def _add_stacked(sums: np.ndarray, counts: np.ndarray, vectors: np.ndarray, count2: int, count3: int) -> None:
    """A matrix for each of the outer dimensions of `vectors` (n3, n2, tokens, columns), in turn."""
    for i3, outer in enumerate(vectors):
        for i2, rows in enumerate(outer):
            matrix = (i3 % count3) * count2 + i2 % count2
            sums[matrix] += np.einsum("tc,tc->c", rows, rows)
            counts[matrix] += len(rows)


def gather_importance(
    model: Path,
    text: str,
    *,
    memory: int | None = None,
    threads: int | None = None,
    context: int = CONTEXT,
    origin: str = "calibration text",
    progress: Callable[[float], None] | None = None,
) -> Importance:
    """Compute `text` with the GGUF file `model` and add up the squared inputs of every product with a weight.

    Windows as in `perplexity`, with logits for all tokens, so that the output matrix is seen as often as the
    others. `memory`: stay within so many bytes (sums excepted), by streaming where the model is larger; None:
    what is free. `origin` names the text in messages and in the saved file. Raises ExportError where the text
    has not one window or the model gives numbers that are not finite, and what `edgeinfer.load` raises.
    """
    file = read_model_file(model)
    context = check_context(file, context)
    operations()
    collector = _Collector(file)
    tap = Tap(collector.wants, collector.visit)
    with scoring_engine(model, context=context, memory=memory, threads=threads, tap=tap) as engine:
        parts = windows(engine.model, text, context, "calibration")
        engine.before_pass = collector.begin_pass
        engine.outputs = "all"
        for number, window in enumerate(parts):
            done = 0

            def passed(tokens: int, total: int, _share: float, number: int = number) -> None:
                nonlocal done
                if tokens > done:
                    done = tokens
                    tap.check()
                    collector.end_pass()
                if progress is not None:
                    progress((number + tokens / total) / len(parts))

            engine.truncate(0)
            engine.prefill(window, passed)
    _check_finite(collector, file.paths[0])
    return Importance(collector.sums, collector.counts, len(parts), context, origin)


def _check_finite(collector: _Collector, path: Path) -> None:
    for name, sums in collector.sums.items():
        if not np.isfinite(sums).all():
            raise ExportError(
                f"{path}: what {name} is multiplied by is not finite on this text. The model is broken: export it "
                "again."
            )
