"""A GGUF model that is checked: its tokenizer, its precision, its logits by llama.cpp in float32 where it can
be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from edgeinfer.engines.llama import LlamaModel
from edgeinfer.exporters.windows import logits_of, scoring_engine
from edgeinfer.modelfile import read_model_file

_FLOATS = ("F32", "F16", "BF16")


class GGUFModel:
    """See check.py for what a model gives."""

    runtime = "llama.cpp"

    def __init__(self, path: Path, memory: int | None):
        self.path = path
        self.file = read_model_file(path)
        self.file.check_can_generate()
        self._memory = memory

    @property
    def precision(self) -> str | None:
        """The least precise type of its matrices; None where one is quantized."""
        types = {tensor.type for tensor in self.file.tensors if len(tensor.shape) > 1}
        if not types <= {*_FLOATS}:
            return None
        return max(types, key=_FLOATS.index) if types else "F32"

    @property
    def has_experts(self) -> bool:
        return self.file.num_experts > 0

    @property
    def most_positions(self) -> int | None:
        return self.file.context_length

    @property
    def vocabulary(self) -> int | None:
        return self.file.vocab_size

    @property
    def float32_matrices(self) -> set[tuple[int, int]]:
        """(rows, columns) of matrices that stay float32 whatever the others are, such as routers."""
        return {
            tensor.shape[::-1]
            for tensor in self.file.tensors
            if tensor.type == "F32" and len(tensor.shape) == 2
        }

    def tokenize(self, text: str) -> list[int] | None:
        if self.file.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        load = {"load_mode": llama_cpp.LLAMA_LOAD_MODE_MMAP, "use_extra_bufts": False, "vocab_only": True}
        with LlamaModel(self.path, **load) as model:
            return model.tokenize(text, add_special=True, parse_special=True)

    def visit_logits(
        self,
        tokens: Sequence[int],
        visit: Callable[[int, np.ndarray], object],
        progress: Callable[[float], None],
    ) -> None:
        """Call `visit(position, float32 (vocabulary,))` for every position; keep a copy, not the array."""
        with scoring_engine(self.path, context=len(tokens), memory=self._memory, exact=True) as engine:
            logits_of(engine, tokens, 0, visit, progress)
