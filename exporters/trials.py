"""The last step of `--quant auto`: near-equal choices, and the stock type of the size, tried as real files.

The predicted divergence leaves out what a rounding happens to do to the probabilities of the right tokens,
which can be as large, for better or worse. Each choice is written, and its loss on the calibration text is
compared with the source's, token by token. The difference is trusted as far as near-equal choices differ by more
than chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeinfer.exporters.auto_bits import Choice, Chooser
from edgeinfer.exporters.importance import Importance
from edgeinfer.exporters.perplexity import LossDifference, Perplexity, perplexity
from edgeinfer.exporters.quant_types import HEADER_ALLOWANCE
from edgeinfer.exporters.quantize import ImportanceNeeded, planned_types, quantize_gguf
from edgeinfer.exporters.windows import CONTEXT
from edgeinfer.modelfile import read_model_file

#: The stock types that are good for their sizes, the largest first.
STOCK = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
_MOST_CHOICES, _LEAST_CHOICES = 16, 4
_LEAST_WINDOWS = 4
_WRITTEN = 3e10  # weights, in all trials together
_WORK = 2e12  # weights times tokens of one trial


@dataclass(frozen=True)
class Trial:
    """A choice, and what its file loses on the text; `stock`: the stock type that it is, if any."""

    choice: Choice
    loss: LossDifference
    stock: str | None = None


class Trials:
    """Tries the choices of `chooser` on `text`; the source is measured once for all sizes.

    Files are written into a folder of their own in `folder` and removed again. `memory`, `threads`: as
    `quantize_gguf` and `perplexity` take them, whose errors are raised.
    """

    def __init__(
        self,
        source: Path,
        text: str,
        importance: Importance,
        chooser: Chooser,
        folder: Path,
        *,
        requantize: bool = False,
        context: int = CONTEXT,
        memory: int | None = None,
        threads: int | None = None,
    ):
        self._source, self._text, self._importance = source, text, importance
        self.chooser = chooser
        self._folder, self._requantize = folder, requantize
        self._limits = {"memory": memory, "threads": threads}
        weights = max(1, read_model_file(source).num_parameters)
        self._count = max(_LEAST_CHOICES, min(_MOST_CHOICES, int(_WRITTEN / weights)))
        most_windows = max(_LEAST_WINDOWS, int(_WORK / weights / context))
        self._scoring = {**self._limits, "context": context, "most_windows": most_windows}
        self._before: Perplexity | None = None
        self._stock: dict[str, Choice | None] = {}

    def run(self, num_bytes: int, progress: Callable[[float], None] | None = None) -> list[Trial]:
        """What was tried for a file of `num_bytes` at most: first what the predictions alone would take.

        Raises ExportError where no file is so small.
        """
        choices: list[tuple[str | None, Choice]] = [
            (None, choice) for choice in self.chooser.near(num_bytes, self._count)
        ]
        choices += self._largest_stock(num_bytes)
        trials: list[Trial] = []
        if self._before is None:
            self._before = perplexity(self._source, self._text, **self._scoring)
        with tempfile.TemporaryDirectory(prefix=".edgeinfer-", dir=self._folder) as scratch:
            for number, (stock, choice) in enumerate(choices):
                path = Path(scratch) / "trial.gguf"
                if self._write(choice, path) <= num_bytes:
                    score = perplexity(path, self._text, **self._scoring)
                    trials.append(Trial(choice, score.difference(self._before), stock))
                if progress is not None:
                    progress((number + 1) / len(choices))
        return trials

    def _write(self, choice: Choice, path: Path) -> int:
        """Bytes of the file."""
        return quantize_gguf(
            self._source,
            path,
            choice.mixture,
            importance=self._importance,
            tensor_types=choice.types,
            requantize=self._requantize,
            **self._limits,
        ).target_bytes

    def _largest_stock(self, num_bytes: int) -> list[tuple[str, Choice]]:
        """The largest of STOCK that may fit and whose every tensor was measured; none where there is none."""
        for name in STOCK:
            if name not in self._stock:
                self._stock[name] = self._stock_choice(name)
            choice = self._stock[name]
            if choice is not None and choice.num_bytes - HEADER_ALLOWANCE <= num_bytes:
                return [(name, choice)]
        return []

    def _stock_choice(self, name: str) -> Choice | None:
        try:
            types = planned_types(
                self._source, name, importance=self._importance, requantize=self._requantize
            )
        except ImportanceNeeded:
            return None
        return self.chooser.stock(name, types)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The trial that is expected to lose least on other texts of the kind.

    Its prediction, moved towards what was measured by the share of the spread that is not the measurement's own
    error (James and Stein's estimate); the spread of the near choices, since what all of them share says
    nothing about which is best.
    """
    near = [trial for trial in trials if trial.stock is None]
    spread = np.var([trial.loss.mean - trial.choice.divergence for trial in near])
    noise = np.mean([trial.loss.error**2 for trial in near])
    trust = max(0.0, 1.0 - float(noise / max(spread, 1e-30)))
    return min(trials, key=lambda t: t.choice.divergence + trust * (t.loss.mean - t.choice.divergence))
