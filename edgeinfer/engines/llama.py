"""llama.cpp's C API behind three small classes: a model, a context, a sampler. No policy, no `Llama` class.

The functions are those of llama-cpp-python's ctypes bindings, which release the GIL during each call. Every
parameter of a context is set here, so that a result does not depend on llama.cpp's defaults of the day.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np

from edgeinfer.engines.llama_log import error_reason, forget_errors, load_error, start
from edgeinfer.engines.normalizer import NORMALIZER_KEY, normalized
from edgeinfer.errors import EngineError, PromptError


class DecodeAborted(EngineError):
    """The abort callback stopped a decode; the sequence is as it was before."""


class _BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


class LlamaModel:
    """A model file opened by llama.cpp.

    `load_mode` is one of llama_cpp.LLAMA_LOAD_MODE_*; `use_extra_bufts` lets llama.cpp repack weights for
    this processor, which changes the last digits of the results; `buffer_types` are (pattern of weight names,
    ggml buffer type) that override where weights go. `progress` is called with the fraction that is loaded.
    Close every context before the model.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        load_mode: int,
        use_extra_bufts: bool,
        vocab_only: bool = False,
        buffer_types: Sequence[tuple[str, int]] = (),
        progress: Callable[[float], None] | None = None,
    ):
        start()
        forget_errors()
        params = llama_cpp.llama_model_default_params()
        no_devices = (ctypes.c_void_p * 1)(None)
        params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        params.n_gpu_layers = 0
        params.load_mode = load_mode
        params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_OFF
        params.use_extra_bufts = use_extra_bufts
        params.vocab_only = vocab_only
        overrides = (_BufferTypeOverride * (len(buffer_types) + 1))()
        for override, (pattern, buffer_type) in zip(overrides, buffer_types):
            override.pattern, override.buffer_type = pattern.encode(), buffer_type
        if buffer_types:
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        if progress:
            report = llama_cpp.llama_progress_callback(lambda fraction, _data: progress(fraction) or True)
            params.progress_callback = report
        self.path = os.fspath(path)
        self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise load_error(self.path)
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self._normalizer = self._metadata(NORMALIZER_KEY)

    def _metadata(self, key: str) -> str | None:
        """A short text of the file's metadata; None where there is none."""
        value = ctypes.create_string_buffer(64)
        length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace") if 0 <= length < len(value) else None

    @property
    def vocab_size(self) -> int:
        return llama_cpp.llama_vocab_n_tokens(self.vocab)

    @property
    def train_context(self) -> int:
        """Tokens of context that the model was trained with."""
        return llama_cpp.llama_model_n_ctx_train(self.handle)

    @property
    def has_encoder(self) -> bool:
        return llama_cpp.llama_model_has_encoder(self.handle)

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template, or None."""
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def bos_text(self) -> str:
        """The text of the token that begins a sequence, "" if the vocabulary has none."""
        return self._token_text(llama_cpp.llama_vocab_bos(self.vocab))

    @property
    def eos_text(self) -> str:
        """The text of the token that ends a sequence, "" if the vocabulary has none."""
        return self._token_text(llama_cpp.llama_vocab_eos(self.vocab))

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `add_special` adds what the vocabulary wants around a text (such as BOS); `parse_special` reads the
        names of control tokens in the text as those tokens.
        """
        try:
            data = normalized(text, self._normalizer).encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"The prompt is not valid Unicode text: {error}.") from None
        capacity = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * capacity)()
            count = llama_cpp.llama_tokenize(
                self.vocab, data, len(data), tokens, capacity, add_special, parse_special
            )
            if count >= 0:
                return list(tokens[:count])
            if -count <= capacity:
                raise EngineError(f"llama.cpp could not tokenize a text of {len(data)} bytes.")
            capacity = -count

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, perhaps part of a character; b"" for control tokens."""
        capacity = 64
        while True:
            piece = ctypes.create_string_buffer(capacity)
            length = llama_cpp.llama_token_to_piece(self.vocab, token, piece, capacity, 0, False)
            if length >= 0:
                return piece.raw[:length]
            capacity = -length

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (end of text, of turn, of message)."""
        return llama_cpp.llama_vocab_is_eog(self.vocab, token)

    def close(self) -> None:
        handle, self.handle, self.vocab = self.handle, None, None
        if handle:
            llama_cpp.llama_model_free(handle)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class LlamaContext:
    """One sequence of tokens and its KV cache. Every call must come from one thread at a time.

    `context_length`: the most tokens the sequence may hold. `ubatch`: the most tokens of one decode.
    `outputs_max`: the most positions of one decode whose logits are kept (each costs vocab_size floats).
    `float32_cache`: keys and values are not rounded to float16. `flash_attention`: None lets llama.cpp
    choose. `cb_eval` and `abort` are addresses of C functions of the types ggml_backend_sched_eval_callback
    and ggml_abort_callback; `cb_data` and `abort_data` are what they are given.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        context_length: int,
        ubatch: int = 512,
        threads: int,
        threads_batch: int | None = None,
        outputs_max: int = 1,
        flash_attention: bool | None,
        float32_cache: bool = False,
        cb_eval: int | None = None,
        cb_data: int | None = None,
        abort: int | None = None,
        abort_data: int | None = None,
    ):
        forget_errors()
        params = _context_params(context_length, ubatch, threads, threads_batch, outputs_max, flash_attention)
        if float32_cache:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        if cb_eval:
            params.cb_eval = ctypes.cast(cb_eval, llama_cpp.ggml_backend_sched_eval_callback)
            params.cb_eval_user_data = cb_data
        if abort:
            params.abort_callback = ctypes.cast(abort, llama_cpp.ggml_abort_callback)
            params.abort_callback_data = abort_data
        self.model = model
        self.context_length = context_length
        self.ubatch = ubatch
        self.outputs_max = outputs_max
        self.position = 0
        self._batch = None
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise EngineError(
                f"llama.cpp could not make a context of {context_length} tokens for {model.path}: {error_reason()}"
            )
        self._memory = llama_cpp.llama_get_memory(self.handle)
        if not self._memory:
            self.close()
            raise EngineError(f"{model.path} keeps no sequence: it is an encoder, which cannot write text.")
        self._vocab_size = model.vocab_size
        self._batch = llama_cpp.llama_batch_init(ubatch, 0, 1)
        for i in range(ubatch):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0

    def decode(self, tokens: Sequence[int], outputs: str = "last") -> None:
        """Append `tokens` (1 to `ubatch`) to the sequence; compute logits for the last or for "all" of them.

        Raises DecodeAborted when the abort callback said so, EngineError on any other failure; the sequence
        is then as before. (A recurrent state cannot be cut back: it is then empty, `position` 0.)
        """
        count = len(tokens)
        wanted = count if outputs == "all" else 1
        if not 1 <= count <= self.ubatch or wanted > self.outputs_max:
            raise ValueError(
                f"expected 1 to {self.ubatch} tokens and at most {self.outputs_max} outputs, "
                f"got {count} and {wanted}"
            )
        if self.position + count > self.context_length:
            raise EngineError(
                f"The context holds {self.context_length} tokens: {self.position} are used, "
                f"{count} more do not fit."
            )
        batch = self._batch
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.position + i
            batch.logits[i] = i >= count - wanted
        forget_errors()
        status = llama_cpp.llama_decode(self.handle, batch)
        if status == 0:
            self.position += count
            return
        self.truncate(self.position)
        if status == 2:
            raise DecodeAborted("The computation was stopped.")
        raise EngineError(f"llama.cpp could not compute {count} tokens (status {status}): {error_reason()}")

    def logits(self, i: int = -1) -> np.ndarray:
        """float32 (vocab_size,) logits of output position `i` of the last decode.

        A view of llama.cpp's memory: the next decode overwrites it and `close` frees it.
        """
        pointer = llama_cpp.llama_get_logits_ith(self.handle, i)
        if not pointer:
            raise EngineError(f"There are no logits for position {i} of the last decode.")
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))

    def truncate(self, length: int) -> int:
        """Forget every token from position `length` on; gives the new length.

        A recurrent state cannot be cut back: the sequence is then emptied and 0 is given.
        """
        if not 0 <= length <= self.position:
            raise ValueError(f"expected a length of 0 to {self.position}, got {length}")
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1):
            llama_cpp.llama_memory_clear(self._memory, False)
            length = 0
        self.position = length
        return length

    def close(self) -> None:
        batch, self._batch = self._batch, None
        handle, self.handle, self._memory = self.handle, None, None
        if batch is not None:
            llama_cpp.llama_batch_free(batch)
        if handle:
            llama_cpp.llama_free(handle)

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _context_params(
    context_length: int,
    ubatch: int,
    threads: int,
    threads_batch: int | None,
    outputs_max: int,
    flash_attention: bool | None,
) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = ubatch
    params.n_seq_max = 1
    params.n_rs_seq = 0
    params.n_outputs_max = params.n_outputs_max_per_seq = outputs_max
    params.n_threads = threads
    params.n_threads_batch = threads_batch or threads
    params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    params.attention_type = llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED
    # Position scaling is the model's: "unspecified", 0 and negative numbers mean what its file says.
    params.rope_scaling_type = llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
    params.rope_freq_base = params.rope_freq_scale = 0.0
    params.yarn_ext_factor = params.yarn_attn_factor = -1.0
    params.yarn_beta_fast = params.yarn_beta_slow = -1.0
    params.yarn_orig_ctx = 0
    params.flash_attn_type = {
        None: llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
        False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    }[flash_attention]
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
    params.embeddings = False
    # op_offload and offload_kqv would copy host weights to a GPU before any callback sees the node.
    params.offload_kqv = params.op_offload = False
    params.no_perf = True
    params.swa_full = True
    params.kv_unified = False
    return params


class Sampler:
    """Chooses the next token from a context's logits; temperature 0 takes the most probable one.

    `seed` makes the choices repeatable; None takes a fresh one.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None, model: LlamaModel):
        params = llama_cpp.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(params)
        if temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(top_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(temperature))
        self._add(llama_cpp.llama_sampler_init_dist(llama_cpp.LLAMA_DEFAULT_SEED if seed is None else seed))

    def _add(self, sampler: object) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: LlamaContext) -> int:
        """The token that follows the last decode of `context`."""
        return llama_cpp.llama_sampler_sample(self._chain, context.handle, -1)

    def close(self) -> None:
        chain, self._chain = self._chain, None
        if chain:
            llama_cpp.llama_sampler_free(chain)
