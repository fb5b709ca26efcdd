"""Tiny random checkpoints of every architecture, and the logits that PyTorch and llama.cpp give.

What a missing transform would hide behind (norms of one, biases of zero, equal heads) is made random.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.exporters.vocabulary import Vocabulary

# `pytest` does not add the root of the project, where benchmarks/ is
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.vocabulary import make_vocabulary  # noqa: E402

VOCABULARY = 360
CONTEXT = 256  # llama.cpp makes no smaller one
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: Name of the mapping -> transformers' class, and what differs from _COMMON.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("OlmoeForCausalLM", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", {}),
}

GELU = ("gemma2", "gemma3")


@dataclass(frozen=True)
class Tiny:
    """A saved checkpoint and the logits of transformers for `tokens`: [positions, vocabulary].

    `rounded`: the same, but gelu rounded to float16 as llama.cpp does.
    """

    folder: Path
    tokens: list[int]
    logits: np.ndarray
    rounded: np.ndarray


def tiny_checkpoint(
    folder: Path,
    architecture: str,
    *,
    dtype: str = "float32",
    positions: int = 20,
    shard_size: str = "1GB",
    original_format: bool = True,
    **config: Any,
) -> Tiny:
    """Save a random model of `architecture`; the logits are the saved weights', in float32."""
    import torch
    import transformers

    name, own = MODELS[architecture]
    torch.manual_seed(5)
    torch.set_num_threads(1)
    cls = getattr(transformers, name)
    with _quiet():
        settings = cls.config_class(**{**_COMMON, **own, **config})
        model = cls(settings)
        _randomize(model)
        model.to(getattr(torch, dtype)).save_pretrained(
            folder, max_shard_size=shard_size, save_original_format=original_format
        )
        model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = [int(token) for token in torch.randint(3, VOCABULARY, (positions,))]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        rounded = logits
        if architecture in GELU:
            for layer in model.model.layers:
                layer.mlp.act_fn.forward = _half_gelu
            rounded = model(torch.tensor([tokens])).logits[0].numpy()
    return Tiny(folder, tokens, logits, rounded)


def _half_gelu(x: Any) -> Any:
    """gelu as llama.cpp looks it up from -10 to 10, in a table of float16 (ggml_vec_geglu_f32)."""
    import torch

    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


def _randomize(model: Any) -> None:
    """Weights larger than transformers', so that each layer changes the result; norms about one."""
    import torch

    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)


@contextlib.contextmanager
def _quiet():
    """transformers shows a bar and warnings."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


def plain_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    """Stands in for vocabulary.read_vocabulary where a test is about weights: needs no files."""
    size = config["vocab_size"]
    made = make_vocabulary(size)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": made.tokens,
        "tokenizer.ggml.scores": made.scores,
        "tokenizer.ggml.token_type": made.types,
    }
    return Vocabulary(metadata, size)


@functools.cache
def _no_log():
    """A callback that stays: llama.cpp calls it as long as no other one is set."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def llama_logits(path: Path, tokens: list[int], context: int = CONTEXT) -> np.ndarray:
    """The logits of stock llama.cpp at each position: float32 KV cache, no flash attention, one thread."""
    import llama_cpp

    llama_cpp.llama_log_set(_no_log(), ctypes.c_void_p(0))
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
    assert model, f"llama.cpp cannot load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context, len(tokens), len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    ctx = llama_cpp.llama_init_from_model(model, params)
    assert ctx
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert llama_cpp.llama_decode(ctx, batch) == 0
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        found = llama_cpp.llama_get_logits(ctx)
        return np.ctypeslib.as_array(found, (len(tokens), vocabulary)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)


def relative_differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference at each position, relative to the largest logit of all."""
    return np.abs(found - expected).max(axis=1) / np.abs(expected).max()


def add_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer like GPT-2's, with VOCABULARY tokens, beginning and end among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
