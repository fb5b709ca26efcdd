"""A trained model and its tokenizer as one GGUF file that stock llama.cpp runs."""
from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch

from model import Model

DESCRIPTION = ("A small English {kind}, trained from scratch on TinyStories excerpts and public-domain "
               "children's books.")
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
LAYER_TENSORS = {
    "attention_norm.weight": "attn_norm", "attention.q.weight": "attn_q", "attention.k.weight": "attn_k",
    "attention.v.weight": "attn_v", "attention.out.weight": "attn_output", "ffn_norm.weight": "ffn_norm",
    "ffn.gate.weight": "ffn_gate", "ffn.up.weight": "ffn_up", "ffn.down.weight": "ffn_down",
    "ffn.router.weight": "ffn_gate_inp", "ffn.experts.gate.weight": "ffn_gate_exps",
    "ffn.experts.up.weight": "ffn_up_exps", "ffn.experts.down.weight": "ffn_down_exps",
}
# The model continues a text; a chat is the text so far, each further request a new paragraph.
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}"
                 "{% if message['role'] == 'user' and not loop.first %}{{ '\\n\\n' }}{% endif %}"
                 "{{ message['content'] }}{% endfor %}")


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our parameters."""
    if name == "embedding.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_TENSORS[rest]}.weight"


def export_tensors(model: Model) -> dict[str, np.ndarray]:
    """llama.cpp's names and our values; the experts' matrices of a layer stacked, (experts, out, in)."""
    stacks: dict[str, list[np.ndarray]] = {}
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().to(torch.float32).numpy()
        stack = re.sub(r"\.experts\.\d+\.", ".experts.", name)  # parameters come in the order of the experts
        if stack == name:
            tensors[gguf_name(name)] = values
        else:
            stacks.setdefault(gguf_name(stack), []).append(values)
    return tensors | {name: np.stack(values) for name, values in stacks.items()}


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Write pieces, scores and kinds, so that llama.cpp splits text as SentencePiece does."""
    pieces, scores, kinds = [], [], []
    for token in range(tokenizer.get_piece_size()):
        kind = gguf.TokenType.NORMAL
        if tokenizer.is_unknown(token):
            kind = gguf.TokenType.UNKNOWN
        elif tokenizer.is_control(token):
            kind = gguf.TokenType.CONTROL
        elif tokenizer.is_byte(token):
            kind = gguf.TokenType.BYTE
        pieces.append(tokenizer.id_to_piece(token).encode())
        scores.append(tokenizer.get_score(token))
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(tokenizer.eos_id())
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(
    model: Model, tokenizer: sentencepiece.SentencePieceProcessor, path: Path, name: str, type_name: str
) -> None:
    """Write `model` to `path`; matrices in `type_name` (F32, F16 or Q8_0), norms and routers in F32."""
    config = model.config
    matrix_type, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"edgeinfer-{name}")
    kind = "mixture-of-experts story model" if config.num_experts else "story model"
    writer.add_description(DESCRIPTION.format(kind=kind))
    writer.add_license("CDLA-Sharing-1.0")
    writer.add_languages(["en"])
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.embedding_length)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_length)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_dimension_count(config.head_length)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_used)
    writer.add_file_type(file_type)
    write_vocabulary(writer, tokenizer)
    for tensor_name, values in export_tensors(model).items():
        small = values.ndim == 1 or ".ffn_gate_inp." in tensor_name
        type_ = gguf.GGMLQuantizationType.F32 if small else matrix_type
        data = gguf.quantize(np.ascontiguousarray(values), type_)
        writer.add_tensor(tensor_name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
