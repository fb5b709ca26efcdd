"""`--quant auto`: bits for each tensor, so that the file has the size that was asked for, and predicts best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeinfer.budget import format_size, parse_size
from edgeinfer.engines.ggml import BLOCKS
from edgeinfer.errors import ExportError
from edgeinfer.exporters.allocate import Option, allocate, smallest_bytes
from edgeinfer.exporters.importance import Importance
from edgeinfer.exporters.quant_types import (
    FLOAT_TYPES,
    QUANT_TYPES,
    header_bytes,
    needs_importance,
    padded_bytes,
    quantized_bytes,
)
from edgeinfer.exporters.quantize import planned_types
from edgeinfer.exporters.sensitivity import Losses, measure_losses
from edgeinfer.exporters.windows import CONTEXT
from edgeinfer.modelfile import ModelFile, TensorInfo, read_model_file

#: What a tensor may become. Ternary and 1-bit types are for models that were trained for them.
CANDIDATES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("F16", "BF16"),
)
#: Small for what they lose, but slow to compute on a processor: only where other types would lose much more.
_SLOW = ("IQ2_", "IQ3_")
_SLOW_BELOW_BITS = 4.0
_UNCERTAINTY = 0.4  # of a loss's logarithm; choices made with it are predicted to lose a tenth more
_MIXTURE = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


@dataclass(frozen=True)
class Choice:
    """Tensor -> type for `quantize_gguf`, with the mixture that its file is named after.

    `divergence`: nats a token that rounding is predicted to cost; `num_bytes`: the most that the file takes.
    """

    types: dict[str, str]
    mixture: str
    divergence: float
    num_bytes: int


class Chooser:
    """What was measured of one model, from which a choice can be made for any size."""

    def __init__(self, file: ModelFile, losses: Losses, fixed: dict[str, str]):
        self._file, self._losses, self._fixed = file, losses, fixed
        self._items = {
            tensor.name: [
                Option(type, padded_bytes(tensor.shape, type), loss)
                for type, loss in losses[tensor.name].items()
            ]
            for tensor in file.tensors
            if tensor.name in losses
        }
        self._base = header_bytes(file) + sum(
            padded_bytes(tensor.shape, fixed[tensor.name]) for tensor in file.tensors if tensor.name in fixed
        )

    @property
    def smallest_bytes(self) -> int:
        """Bytes of the smallest file that can be made."""
        return self._base + smallest_bytes(self._items)

    def choose(self, num_bytes: int) -> Choice:
        """The best types for a file of `num_bytes` at most. Raises ExportError where none is so small."""
        return self._choose(self._items_for(num_bytes), num_bytes)

    def near(self, num_bytes: int, count: int) -> list[Choice]:
        """`choose`, and `count` others at most that would be best if losses were a little different."""
        rng, items = np.random.default_rng(0), self._items_for(num_bytes)
        choices = [self._choose(items, num_bytes)]
        for _ in range(count):
            factors = np.exp(rng.normal(0, _UNCERTAINTY, len(items)))
            choice = self._choose(
                {
                    name: [Option(o.name, o.num_bytes, o.loss * factor) for o in options]
                    for (name, options), factor in zip(items.items(), factors)
                },
                num_bytes,
            )
            if all(choice.types != other.types for other in choices):
                choices.append(choice)
        return choices

    def stock(self, mixture: str, planned: Mapping[str, str]) -> Choice | None:
        """The types `planned` (tensor -> type) of a stock mixture; None where one was not measured."""
        types = {name: planned[name] for name in self._items}
        if any(types[name] not in self._losses[name] for name in types) or any(
            planned[name] != type for name, type in self._fixed.items()
        ):
            return None
        return self._made(types, mixture)

    def _items_for(self, num_bytes: int) -> dict[str, list[Option]]:
        items = self._items
        if not _takes_slow_types(self._file, num_bytes):
            fast = {
                name: [o for o in options if not o.name.startswith(_SLOW)] for name, options in items.items()
            }
            items = fast if self._base + smallest_bytes(fast) <= num_bytes else items
        return items

    def _choose(self, items: Mapping[str, Sequence[Option]], num_bytes: int) -> Choice:
        found = allocate(items, num_bytes - self._base)
        if found is None:
            raise ExportError(
                f"{self._file.paths[0]} cannot be made as small as {format_size(num_bytes)}: the smallest that can "
                f"be is {format_size(self.smallest_bytes)} ({self.smallest_bytes} bytes). Give a larger --size."
            )
        types = {name: option.name for name, option in found.items()}
        return self._made(types, _mixture(self._file, types))

    def _made(self, types: dict[str, str], mixture: str) -> Choice:
        return Choice(
            types,
            mixture,
            sum(self._losses[name][type] for name, type in types.items()),
            quantized_bytes(self._file, {**self._fixed, **types}),
        )


def measure(
    source: Path,
    text: str,
    importance: Importance,
    *,
    num_bytes: int,
    requantize: bool = False,
    context: int = CONTEXT,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Chooser:
    """Measure on `text` what each tensor of `source` loses as each type, for files of `num_bytes` or more.

    Takes the time of computing some windows of the text once for each tensor (96 groups of them at most).
    Raises ExportError, at once where no file can be so small, and what `quantize_gguf` and `perplexity`
    raise.
    """
    file = read_model_file(source)
    file.check_can_generate()
    planned = planned_types(source, "Q8_0", importance=importance, requantize=requantize)
    stored = {tensor.name: tensor.type for tensor in file.tensors}
    # What llama.cpp leaves as it is (norms, gates of experts) is not ours to round either.
    candidates = {
        tensor.name: _candidates(tensor, importance, _takes_slow_types(file, num_bytes))
        for tensor in file.tensors
        if planned[tensor.name] != stored[tensor.name]
    }
    fixed = {name: type for name, type in planned.items() if name not in candidates}
    Chooser(file, {name: dict.fromkeys(types, 0.0) for name, types in candidates.items()}, fixed).choose(
        num_bytes
    )
    bits = max(1.0, 8 * num_bytes / max(1, file.num_parameters))
    losses = measure_losses(
        file, candidates, text, importance, bits, context=context, threads=threads, progress=progress
    )
    for tensor in file.tensors:
        if tensor.name in losses:
            losses[tensor.name][tensor.type] = 0.0
    return Chooser(file, losses, fixed)


def target_bytes(size: str, file: ModelFile) -> int:
    """Bytes that `--size` means: "2GiB", or "30%" of the source's file."""
    text = size.strip()
    if not text.endswith("%"):
        return parse_size(text)
    try:
        share = float(text[:-1])
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise ExportError(
            f"The size {size!r} is no share of the source. Expected one above 0% and at most 100%."
        )
    return int(file.file_bytes * share / 100)


def _takes_slow_types(file: ModelFile, num_bytes: int) -> bool:
    return 8 * num_bytes / max(1, file.num_parameters) < _SLOW_BELOW_BITS


def _candidates(tensor: TensorInfo, importance: Importance, slow: bool) -> list[str]:
    known = tensor.name in importance.sums
    largest = padded_bytes(tensor.shape, tensor.type)

    def fits(type: str) -> bool:
        return (
            tensor.shape[0] % BLOCKS[type].block_size == 0
            and padded_bytes(tensor.shape, type) < largest
            and (known or not needs_importance(tensor.name, type))
            and (slow or not type.startswith(_SLOW))
        )

    return [type for type in CANDIDATES if fits(type)]


def _mixture(file: ModelFile, types: dict[str, str]) -> str:
    """The name of the type that most bytes have: what a file's general.file_type says."""
    most: dict[str, int] = {}
    for tensor in file.tensors:
        kind = types.get(tensor.name)
        if kind is not None and kind not in FLOAT_TYPES:
            name = _MIXTURE.get(kind, kind)
            most[name] = most.get(name, 0) + padded_bytes(tensor.shape, kind)
    return max(_known(most), key=lambda name: most[name], default="Q8_0")


def _known(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in QUANT_TYPES]
