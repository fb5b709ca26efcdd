"""A checkpoint that is checked against: transformers computes it in float32, also as llama.cpp would round
it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.budget import default_budget, format_size, process_memory
from edgeinfer.errors import BudgetError, ExportError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_SPARE_BYTES = 256 << 20  # activations, and what PyTorch holds beside weights
_LOGITS_BYTES = 256 << 20  # of all positions; three arrays of them


class TorchModel:
    """See check.py for what a model gives. Weights are in memory between `open` and `close` only."""

    runtime = "PyTorch"
    precision = "F32"

    def __init__(self, folder: Path, memory: int | None):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ExportError(
                f'Checking against a checkpoint needs {error.name}: pip install "edgeinfer[export]"'
            ) from error
        from edgeinfer.exporters.checkpoint import read_checkpoint

        self._torch, self._transformers = torch, transformers
        self.folder = folder
        checkpoint = read_checkpoint(folder)
        self.config = checkpoint.config
        sizes = [4 * record.num_elements for record in checkpoint.tensors.values()]
        logits = min(_LOGITS_BYTES, 4 * 512 * (self.vocabulary or 1))
        self._bytes = sum(sizes) + 2 * max(sizes, default=0) + 3 * logits  # a matrix is copied to be rounded
        self._memory = memory
        self._model: Any = None

    @property
    def most_positions(self) -> int | None:
        found = self._text_config.get("max_position_embeddings")
        if not isinstance(found, int):
            return None
        padding = self._text_config.get("pad_token_id")  # RoBERTa and its kind count positions from behind it
        return found if self.writes_text else max(1, found - (padding or 0) - 1)

    @property
    def vocabulary(self) -> int | None:
        return self._text_config.get("vocab_size")

    @property
    def _text_config(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids with those that the tokenizer adds; None where the folder has no tokenizer."""
        if not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        with _quiet(self._transformers), self._explained("open the tokenizer of"):
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
            return list(tokenizer(text)["input_ids"])

    def open(self, headless: bool) -> None:
        """Load the weights in float32; `headless`: the model without what makes logits of its states.
        BudgetError where they do not fit.
        """
        self.require_memory()
        options = {"dtype": self._torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        safe = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        with _quiet(self._transformers), self._explained("open the weights of"):
            model, info = self._class(headless).from_pretrained(str(self.folder), **options, **safe)
        if missing := sorted(info.get("missing_keys", ())):
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ExportError(
                f"{self.folder}: transformers finds no weights for {shown}, so it cannot be checked."
            )
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        self._model = model.eval()

    def require_memory(self) -> None:
        """BudgetError where the weights in float32 do not fit, before anything is read."""
        budget = default_budget() if self._memory is None else self._memory
        needed = process_memory().rss_bytes + self._bytes + _SPARE_BYTES
        if needed > budget:
            raise BudgetError(
                f"Checking {self.folder} computes it in float32 with PyTorch, which takes "
                f"{format_size(needed)}: more than the {format_size(budget)} of memory. "
                "Raise --memory, or export without --check.",
                smallest_bytes=needed,
            )

    @property
    def writes_text(self) -> bool:
        """Whether its logits are of the token that follows."""
        return self._architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))

    @property
    def _architecture(self) -> str:
        return next(iter(self.config.get("architectures") or ()), "")

    def _class(self, headless: bool) -> Any:
        if headless:
            return self._transformers.AutoModel
        if self.writes_text:
            return self._transformers.AutoModelForCausalLM
        found = getattr(self._transformers, self._architecture, None)
        known = isinstance(found, type) and issubclass(found, self._transformers.PreTrainedModel)
        return found if known else self._transformers.AutoModel

    def close(self) -> None:
        self._model = None
        gc.collect()  # modules refer to each other in circles

    def outputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output that is a tensor, float32, by its name."""
        with self._torch.inference_mode(), self._explained("compute with the weights of"):
            found = self._model(**{name: self._torch.tensor(array) for name, array in inputs.items()})
        tensors = {name: value for name, value in found.items() if isinstance(value, self._torch.Tensor)}
        return {name: value.float().numpy() for name, value in tensors.items()}

    def logits(self, tokens: Sequence[int]) -> tuple[np.ndarray, bool]:
        """(float32 (positions, vocabulary), whether gelu is used that llama.cpp rounds)."""
        with self._rounding(None, frozenset()) as seen:
            return self.outputs({"input_ids": np.array([tokens])})["logits"][0], seen.gelu

    def rounded_logits(self, tokens: Sequence[int], precision: str, kept: set[tuple[int, int]]) -> np.ndarray:
        """The same where matrices and what they are multiplied by are rounded to `precision`, but for those
        of a shape in `kept`, and gelu as llama.cpp's table rounds it.
        """
        types = {"F32": self._torch.float32, "F16": self._torch.float16, "BF16": self._torch.bfloat16}
        with self._rounding(types[precision], kept):
            return self.outputs({"input_ids": np.array([tokens])})["logits"][0]

    def _rounding(self, dtype: Any, kept: frozenset | set) -> Any:
        torch, functional = self._torch, self._torch.nn.functional

        class Rounding(torch.overrides.TorchFunctionMode):
            gelu = False

            def __torch_function__(self, function, _types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if function is functional.gelu and kwargs.get("approximate") == "tanh":
                    self.gelu = True
                    return function(*args, **kwargs) if dtype is None else _table_gelu(torch, args[0])
                if dtype is None or dtype is torch.float32:
                    return function(*args, **kwargs)
                if function is functional.linear and tuple(args[1].shape) not in kept:
                    args = (args[0].to(dtype).float(), args[1].to(dtype).float(), *args[2:])
                found = function(*args, **kwargs)
                return found.to(dtype).float() if function is torch.embedding else found

        return Rounding()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """transformers raises errors of many kinds for what a folder may hold."""
        try:
            yield
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            words = " ".join(str(error).split())[:400] or type(error).__name__
            raise ExportError(f"transformers cannot {what} {self.folder}: {words}") from error


def _table_gelu(torch: Any, x: Any) -> Any:
    """gelu as llama.cpp looks it up: between -10 and 10 in a table of float16 for float16
    (ggml_vec_gelu_f32).
    """
    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the bars and warnings of transformers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
