"""How far two models' answers are apart, and how far rounding may take them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from edgeinfer.errors import ExportError

#: What sums in another order differ by, with much to spare; of the largest number (see CheckReport).
FLOAT32_LIMIT = 1e-4
#: Unit roundoff of the types: half of the distance from 1 to the next number.
ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_NUMBERS_AT_ONCE = 1 << 20
#: The smallest number with all its digits. Where all of the source's are below it, theirs are lost:
#: differences are then relative to it.
_SMALLEST = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126, None: 2.0**-14}


@dataclass(frozen=True)
class CheckReport:
    """The answers of `source` (PyTorch, llama.cpp, ONNX Runtime) held against those of the result.

    `precision`: the type that both compute in at least, None for quantized ones. `positions`: vectors of
    numbers that were compared: the logits of a position of the text, or the last axis of an output.

    Relative differences are |a - b| over the largest |a| of all positions, a being the source's numbers:
    `relative_difference` is the largest one (of the worst output, where there are several),
    `typical_difference` the median over positions of each position's largest. `expected_difference`: what the
    judged one of the two is between the source and the source rounded as llama.cpp would, where that was
    computed. `limit`: of the judged one; None: not judged.

    `top_agreement`: share of positions with the same largest number. `failure`: what is wrong, None where
    nothing is.
    """

    source: str
    precision: str | None
    positions: int
    largest_difference: float
    mean_difference: float
    relative_difference: float
    typical_difference: float
    top_agreement: float
    source_perplexity: float | None = None
    result_perplexity: float | None = None
    expected_difference: float | None = None
    limit: float | None = None
    judged: str = "largest"
    notes: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None

    def lines(self) -> list[str]:
        """For the screen."""
        judged = "not judged" if self.limit is None else f"the {self.judged} may be {self.limit:.1e}"
        lines = [
            f"against {self.source} at {self.positions:,} positions, {self.precision or 'quantized'}:",
            f"  difference: largest {self.largest_difference:.3g}, mean {self.mean_difference:.3g}",
            f"  relative to the largest number: largest {self.relative_difference:.2e}, typical "
            f"{self.typical_difference:.2e}; {judged}",
            f"  same top choice: {self.top_agreement:.2%}",
        ]
        if self.source_perplexity is not None:
            pair = f"{self.source_perplexity:.4f} of the source, {self.result_perplexity:.4f} of the result"
            lines.append(f"  perplexity: {pair}")
        lines += [f"  {note}" for note in self.notes]
        return lines + [f"  FAILED: {self.failure}" if self.failure else "  passed"]

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass
class Comparison:
    """Gathers differences, position by position. `precision`: of the two, as in CheckReport."""

    precision: str | None
    positions: int = 0
    agreed: int = 0
    numbers: int = 0
    total: float = 0.0
    largest: float = 0.0
    magnitude: float = 0.0
    at: list[float] = field(default_factory=list)  # the largest difference of each position
    finite: bool = True

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """float32 (positions, numbers) of the source and of the result."""
        together = max(1, _NUMBERS_AT_ONCE // max(1, expected.shape[1]))
        for start in range(0, len(expected), together):
            self._add(expected[start : start + together], found[start : start + together])

    def _add(self, expected: np.ndarray, found: np.ndarray) -> None:
        if not np.isfinite(expected).all():
            raise ExportError(
                "The source itself gives numbers that are not finite, so nothing can be compared."
            )
        difference = np.abs(found.astype(np.float64) - expected)
        self.finite = self.finite and bool(np.isfinite(difference).all())
        difference = np.nan_to_num(difference, nan=0.0, posinf=0.0)
        self.positions += len(expected)
        self.agreed += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        self.numbers += expected.size
        self.total += float(difference.sum())
        self.largest = max(self.largest, float(difference.max(initial=0)))
        self.magnitude = max(self.magnitude, float(np.abs(expected).max(initial=0)))
        self.at += difference.max(axis=1, initial=0).tolist()

    @property
    def relative(self) -> np.ndarray:
        """Of each position: its largest difference over the largest number of all."""
        return np.array(self.at) / max(self.magnitude, _SMALLEST[self.precision])


@dataclass(frozen=True)
class Limit:
    """How large a relative difference may be: "largest" over the positions, or "typical", the median; None:
    any.
    """

    value: float | None
    judged: str = "largest"
    expected: float | None = None

    def of(self, relative: np.ndarray) -> float:
        """The judged one of a comparison's relative differences."""
        if not len(relative):
            return 0.0
        return float(np.median(relative) if self.judged == "typical" else relative.max())


def limit_for(precision: str | None, experts: bool, expected: np.ndarray | None) -> Limit:
    """What rounding to `precision` explains. `expected`: relative differences that it was seen to make,
    position by position, or None.

    Measured: the largest difference of a dense model is 0.85 to 1.5 times what rounding PyTorch's numbers
    predicts; 4 times that is the limit. In a mixture of `experts` rounding may choose another one, which
    changes a position by far more than rounding does, and those after it a little; so the median is judged
    there (measured: 0.7 to 1.4 times what was predicted, for 2 to 24 layers). Where nothing was predicted: 32
    roundoffs of the type (measured: 1.3 to 5.6 for GGUF models of 5 to 40 layers, 1.3 to 20.6 for ONNX models
    in float16), half of that for the median.
    """
    if precision is None:
        return Limit(None)
    flips = experts and precision != "F32"
    roundoff = ROUNDOFF[precision]
    if expected is None:
        return Limit(max(FLOAT32_LIMIT, (16 if flips else 32) * roundoff), "typical" if flips else "largest")
    if flips:
        predicted = Limit(None, "typical").of(expected)
        return Limit(max(FLOAT32_LIMIT, 4 * max(predicted, roundoff)), "typical", predicted)
    predicted = Limit(None).of(expected)
    return Limit(max(FLOAT32_LIMIT, 4 * predicted), "largest", predicted)


def judge(comparison: Comparison, limit: Limit, precision: str | None) -> str | None:
    """What is wrong, or None."""
    if not comparison.finite:
        return "the result gives numbers that are not finite"
    relative = comparison.relative
    found = limit.of(relative)
    if limit.value is None or found <= limit.value:
        return None
    why = "the order of sums" if precision == "F32" else f"rounding to {precision}"
    beyond = np.flatnonzero(relative > limit.value)
    return (
        f"the {limit.judged} difference is {found:.1e} of the largest number, more than the "
        f"{limit.value:.1e} that {why} explains ({len(beyond)} of {len(relative)} positions are beyond it, "
        f"first position {beyond[0]})"
    )


def less_precise(one: str | None, other: str | None) -> str | None:
    """The type of two that rounds more; None (quantized) rounds most."""
    return None if one is None or other is None else max(one, other, key=ROUNDOFF.__getitem__)
