"""Stock llama.cpp through its plain C API, as a user gets it: a mapped file, its own defaults.

Only the context length, the threads and whether weights are repacked are set. Nothing of edgeinfer is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import llama_cpp


@llama_cpp.llama_log_callback
def _no_log(_level: int, _text: bytes, _data: object) -> None:
    pass


class StockModel:
    """A loaded model with one sequence. RuntimeError when llama.cpp refuses."""

    def __init__(self, path: str | os.PathLike, *, context_length: int, threads: int, repack: bool):
        llama_cpp.llama_log_set(_no_log, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"stock llama.cpp could not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context_length
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"stock llama.cpp could not make a context of {context_length} tokens")
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, True)
        return list(tokens[:count])

    def decode(self, tokens: Sequence[int]) -> int:
        """Append `tokens`; the most probable next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"stock llama.cpp could not compute {len(tokens)} tokens (status {status})")
        return llama_cpp.llama_sampler_sample(self._sampler, self._context, -1)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
