"""Whether an export is right: source and result on the same input.

What is compared gives `runtime` (who computes it) and `precision` ("F32", "F16", "BF16", None where it is
quantized).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.check_gguf import GGUFModel
from edgeinfer.exporters.check_onnx import OnnxModel
from edgeinfer.exporters.check_report import (
    CheckReport,
    Comparison,
    Limit,
    judge,
    less_precise,
    limit_for,
)
from edgeinfer.exporters.onnx_calibration import CalibrationData
from edgeinfer.exporters.hyperparameters import complete_config, unseen_window
from edgeinfer.exporters.mapping import find_mapping
from edgeinfer.exporters.perplexity import negative_log_probability

if TYPE_CHECKING:
    from edgeinfer.exporters.check_torch import TorchModel

PAGE = Path(__file__).with_name("texts") / "page.txt"  # The Wind in the Willows (1908), in the public domain
_MOST_POSITIONS = 512
_LOGITS_BYTES = 256 << 20  # of the source, kept until the result's are there
_MOST_SAMPLES = 16
_RANDOM_TOKENS = 128  # where there is no tokenizer

Progress = Callable[[float], None]


def check(
    source: Path,
    result: Path,
    *,
    text: str | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    samples: Path | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare `result` (a GGUF or ONNX file) with what it was made from: a checkpoint folder, a GGUF or an
    ONNX file.

    Language models read the first 512 tokens of `text` (None: the page in PAGE), fewer where the vocabulary
    or the context asks for it; random tokens where there is no tokenizer. Two ONNX models get `inputs`, or
    the first 16 of the `samples` (files, see onnx_calibration), or random ones that fit what the source
    declares. Computing is in float32 wherever the weights are,
    attention included; one model is in memory at a time. A float result fails (`passed` is False) where it
    differs by more than `limit`, any result where it gives other token ids, or numbers that are not finite.

    `memory`: bytes that may be held; GGUF models are streamed where they are larger (ONNX models are not).
    Raises ExportError where
    the two cannot be compared, BudgetError, ModelFileError.
    """
    source, result = Path(source), Path(result)
    report = progress or (lambda _fraction: None)
    text = PAGE.read_text(encoding="utf-8") if text is None else text
    if source.is_dir():
        from edgeinfer.exporters.check_torch import TorchModel

        checkpoint = TorchModel(source, memory)
        if _is_onnx(result):
            return _check_onnx_of_checkpoint(checkpoint, OnnxModel(result), text, report)
        return _check_gguf(checkpoint, GGUFModel(result, memory), text, report)
    if _is_onnx(source) != _is_onnx(result):
        raise ExportError(f"{source} and {result} cannot be compared: expected two GGUF or two ONNX models.")
    if _is_onnx(source):
        return _check_onnx(OnnxModel(source), OnnxModel(result), inputs, samples, report)
    return _check_gguf(GGUFModel(source, memory), GGUFModel(result, memory), text, report)


def require_memory(source: Path, memory: int | None) -> None:
    """BudgetError where `check` cannot compute `source`: to be known before an export is written.

    ONNX and GGUF models are mapped or streamed, and need no more than they get.
    """
    if source.is_dir():
        from edgeinfer.exporters.check_torch import TorchModel

        TorchModel(source, memory).require_memory()


def _is_onnx(path: Path) -> bool:
    """Whether it should be an ONNX file: not by its name alone, as a result has its name only once it is
    right.
    """
    try:
        with open(path, "rb") as file:
            return path.suffix != ".gguf" and file.read(4) != b"GGUF"
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


# ---- language models in GGUF -----------------------------------------------------------------------------


def _check_gguf(
    source: TorchModel | GGUFModel, result: GGUFModel, text: str, progress: Progress
) -> CheckReport:
    tokens, mismatch, notes = _tokens(source, result, text)
    tokens = tokens[: _positions(source, result)]
    if (window := _unseen_window(source)) and window < len(tokens):
        tokens, notes = tokens[:window], (*notes, f"up to the sliding window of {window:,} tokens")
    if len(tokens) < 2:
        raise ExportError(f"The text has {len(tokens)} tokens, expected 2 at least. Give a longer one.")
    precision = less_precise(source.precision, result.precision)
    if isinstance(source, GGUFModel):
        expected, rounded = _gguf_logits(source, tokens, lambda share: progress(share / 2)), None
    else:
        expected, rounded = _torch_logits(source, result, tokens, precision)
    progress(0.5)
    comparison, losses = Comparison(precision), ([], [])

    def visit(position: int, logits: np.ndarray) -> None:
        if len(logits) != expected.shape[1]:
            raise ExportError(
                f"The source gives logits of {expected.shape[1]:,} tokens, the result of {len(logits):,}: "
                "they cannot be compared. The result has another vocabulary."
            )
        comparison.add(expected[position : position + 1], logits[None])
        if position + 1 < len(tokens):
            for found, values in zip(losses, (expected[position], logits)):
                found.append(negative_log_probability(values, tokens[position + 1]))

    result.visit_logits(tokens, visit, lambda share: progress(0.5 + share / 2))
    limit = limit_for(precision, result.has_experts, rounded)
    failure = mismatch or judge(comparison, limit, precision)
    perplexities = [float(np.exp(np.mean(found))) if comparison.finite else None for found in losses]
    return _report(source.runtime, precision, [comparison], limit, failure, notes, perplexities)


def _positions(*models: TorchModel | GGUFModel) -> int:
    fitting = _LOGITS_BYTES // (4 * max(model.vocabulary or 1 for model in models))
    known = [model.most_positions for model in models if model.most_positions]
    return max(2, min(_MOST_POSITIONS, fitting, *known))


def _unseen_window(source: TorchModel | GGUFModel) -> int | None:
    """Beyond it the export says that results differ."""
    if isinstance(source, GGUFModel):
        return None
    mapping = find_mapping(source.config)
    return unseen_window(mapping, complete_config(mapping, source.config))


def _random_tokens(vocabulary: int | None) -> list[int]:
    return np.random.default_rng(0).integers(0, vocabulary or 1, _RANDOM_TOKENS).tolist()


def _tokens(
    source: TorchModel | GGUFModel, result: GGUFModel, text: str
) -> tuple[list[int], str | None, tuple[str, ...]]:
    """(token ids, how the two tokenizers differ or None, notes)."""
    found, theirs = result.tokenize(text), source.tokenize(text)
    if found is None:
        return _random_tokens(result.vocabulary), None, ("random tokens, as the result has no tokenizer",)
    if theirs is None:
        return found, None, ("the source has no tokenizer to compare the result's with",)
    if found == theirs:
        return found, None, (f"same {len(found):,} token ids",)
    place = next(
        (i for i, pair in enumerate(zip(found, theirs)) if pair[0] != pair[1]), min(len(found), len(theirs))
    )
    return (
        found,
        (
            f"the tokenizers differ: token {place} of the text is {theirs[place : place + 1]} in the source "
            f"and {found[place : place + 1]} in the result ({len(theirs):,} and {len(found):,} tokens)"
        ),
        (),
    )


def _gguf_logits(model: GGUFModel, tokens: list[int], progress: Progress) -> np.ndarray:
    kept: list[np.ndarray] = []
    model.visit_logits(tokens, lambda _position, logits: kept.append(logits.copy()), progress)
    return np.stack(kept)


def _torch_logits(
    source: TorchModel, result: GGUFModel, tokens: list[int], precision: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits, relative differences that rounding as llama.cpp does makes; None where that is not judged)."""
    source.open(headless=False)
    with closing(source):
        exact, rounds_gelu = source.logits(tokens)
        if precision is None:
            return exact, None
        rounded = Comparison(precision)
        if precision != "F32" or rounds_gelu:
            rounded.add(exact, source.rounded_logits(tokens, precision, result.float32_matrices))
        return exact, rounded.relative


# ---- ONNX ------------------------------------------------------------------------------------------------


def _check_onnx_of_checkpoint(
    source: TorchModel, result: OnnxModel, text: str, progress: Progress
) -> CheckReport:
    with closing(result):
        result.open()
        if result.reads_text:
            tokens = source.tokenize(text) or _random_tokens(source.vocabulary)
            tokens = tokens[: _positions(source)]
            feeds, given = result.token_inputs(tokens), {"input_ids": np.array([tokens])}
        else:
            tokens, feeds = [], result.made_inputs()
            given = feeds
        found = result.run(feeds)
    progress(0.4)
    with closing(source):
        source.open(headless="logits" not in found)
        expected = source.outputs(given)
    report = _compare_outputs(
        source, result, [{name: expected[name] for name in expected if name in found}], [found]
    )
    progress(1.0)
    if report.passed and source.writes_text and "logits" in expected:
        pair = [_perplexity(array["logits"][0], tokens) for array in (expected, found)]
        return replace(report, source_perplexity=pair[0], result_perplexity=pair[1])
    return report


def _perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    losses = [
        negative_log_probability(row.astype(np.float32), token) for row, token in zip(logits, tokens[1:])
    ]
    return float(np.exp(np.mean(losses)))


def _check_onnx(
    source: OnnxModel,
    result: OnnxModel,
    inputs: Mapping[str, np.ndarray] | None,
    samples: Path | None,
    progress: Progress,
) -> CheckReport:
    with closing(source):
        source.open()
        if inputs is None and samples is None:
            fitting, outputs = source.fitting_inputs()
            feeds, expected = [fitting], [outputs]
        else:
            data = CalibrationData(samples, source.inputs) if inputs is None else None
            feeds = list(islice(iter(data.get_next, None), _MOST_SAMPLES)) if data else [inputs]
            expected = [source.run(each) for each in feeds]
    progress(0.5)
    with closing(result):
        result.open()
        found = [result.run(each) for each in feeds]
    progress(1.0)
    if missing := expected[0].keys() - found[0].keys():
        raise ExportError(
            f"{result.path} has no output {', '.join(sorted(missing))}: it was made from another model."
        )
    return _compare_outputs(source, result, expected, found)


def _compare_outputs(
    source: TorchModel | OnnxModel,
    result: OnnxModel,
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
) -> CheckReport:
    """Outputs of the same names, of one sample or several. Each is judged by its own largest number."""
    precision = less_precise(source.precision, result.precision)
    limit = limit_for(precision, experts=False, expected=None)
    comparisons, failure = [], None
    for name, first in expected[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind not in "fiub":
            continue
        comparison = Comparison(precision)
        for array, other in zip((sample[name] for sample in expected), (sample[name] for sample in found)):
            if other.shape != array.shape:
                shapes = f"{list(array.shape)} in the source and {list(other.shape)} in the result"
                failure = failure or f"output {name!r} has the shape {shapes}"
            elif array.size:
                comparison.add(_rows(array), _rows(other))
        if comparison.positions:
            comparisons.append(comparison)
            if first.dtype.kind == "f" and (wrong := judge(comparison, limit, precision)):
                failure = failure or f"output {name!r}: {wrong}"
    if not comparisons and failure is None:
        raise ExportError(
            f"{result.path}: none of its outputs ({', '.join(found[0])}) is one of the source's with numbers "
            "in it, so nothing can be compared."
        )
    return _report(source.runtime, precision, comparisons, limit, failure, ())


def _rows(array: np.ndarray) -> np.ndarray:
    """float32 (positions, numbers): the last axis is a position's numbers; without axes, one of one."""
    array = array.astype(np.float32)
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _report(
    runtime: str,
    precision: str | None,
    comparisons: list[Comparison],
    limit: Limit,
    failure: str | None,
    notes: tuple[str, ...],
    perplexities: list[float | None] = (None, None),
) -> CheckReport:
    positions = sum(comparison.positions for comparison in comparisons)
    numbers = sum(comparison.numbers for comparison in comparisons)
    return CheckReport(
        source=runtime,
        precision=precision,
        positions=positions,
        largest_difference=max((comparison.largest for comparison in comparisons), default=0.0),
        mean_difference=sum(comparison.total for comparison in comparisons) / max(1, numbers),
        relative_difference=max(
            (float(comparison.relative.max()) for comparison in comparisons), default=0.0
        ),
        typical_difference=max(
            (float(np.median(comparison.relative)) for comparison in comparisons), default=0.0
        ),
        top_agreement=sum(comparison.agreed for comparison in comparisons) / max(1, positions),
        source_perplexity=perplexities[0],
        result_perplexity=perplexities[1],
        expected_difference=limit.expected,
        limit=limit.value,
        judged=limit.judged,
        notes=notes,
        failure=failure,
    )
