"""A decoder of the llama family as one ONNX graph for prefill and decode, its KV cache going in and out.

    input_ids, attention_mask      int64 (batch, tokens now), (batch, tokens so far and now): 1, or 0 for what
                                   fills up a shorter row, on the right
    past_key_values.N.key, .value  (batch, KV heads, tokens so far, head size), for each layer N; no tokens at
                                   first
    num_logits_to_keep             int64, 0 where it is not given: for how many of the last tokens, 0 for all
    logits                         float32 (batch, tokens, vocabulary)
    present.N.key, .value          the cache with the tokens now

The names are those of optimum and onnxruntime-genai. Where past and present are bound to one buffer with room
for more tokens, ONNX Runtime's GroupQueryAttention writes the new ones into it and copies nothing: the number
of tokens is that of attention_mask, not that of the buffer. Several tokens on top of a cache need a batch of
one (its restriction).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from edgeinfer.errors import ExportError
from edgeinfer.exporters.checkpoint import read_checkpoint
from edgeinfer.exporters.hyperparameters import complete_config
from edgeinfer.exporters.mapping import find_mapping
from edgeinfer.exporters.onnx_builder import Builder
from edgeinfer.exporters.onnx_decoder_weights import plain, rows, transposed, weight_name
from edgeinfer.exporters.onnx_nbits import DOMAIN, INT4, INT8, BlockFormat, pack
from edgeinfer.exporters.onnx_rope import Rope, cos_and_sin, read_rope
from edgeinfer.exporters.onnx_scratch import Scratch
from edgeinfer.exporters.onnx_source import OnnxGraph
from edgeinfer.exporters.onnx_weights import Weights
from edgeinfer.exporters.tensor_plan import EMBEDDING, PlannedTensor, plan_tensors

FLOAT, HALF, INT64, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
_OPSETS = {"": 23, DOMAIN: 1}  # RMSNormalization and RotaryEmbedding are operators of 23
_IR_VERSION = 11
_STYLES = Path(__file__).with_name("onnx_decoders.json")


@dataclass(frozen=True)
class Form:
    """How numbers are kept: element types of what is computed and of the embedding, formats of matrices
    (None: as computed), of the output matrix apart, for it is the most sensitive one.
    """

    computed: int = FLOAT
    table: int = FLOAT
    matrices: BlockFormat | None = None
    output: BlockFormat | None = None


FORMS = {
    "F32": Form(),
    "F16": Form(HALF, HALF),
    "INT8": Form(FLOAT, HALF, INT8, INT8),
    "INT4": Form(FLOAT, HALF, INT4, INT8),
}


@dataclass(frozen=True)
class Style:
    """What differs between architectures beyond their tensors."""

    activation: str
    scale_embedding: bool = False


@cache
def styles() -> dict[str, Style]:
    """Name of a mapping -> its style."""
    return {name: Style(**data) for name, data in json.loads(_STYLES.read_text(encoding="utf-8")).items()}


def is_decoder(config: dict[str, Any]) -> bool:
    """Whether a checkpoint with this config is a language model that writes text."""
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)


@dataclass(frozen=True)
class Decoder:
    """`parameters`: of the checkpoint; `quantized`: matrices that are kept in fewer bits."""

    graph: OnnxGraph
    architecture: str
    parameters: int
    quantized: int
    notes: tuple[str, ...]


def build_decoder(
    folder: Path, quant: str, scratch: Scratch, progress: Callable[[float], None] | None = None
) -> Decoder:
    """The graph of the checkpoint in `folder`; `quant`: a name of FORMS. Float weights are read when it is
    written.

    Raises ExportError for an architecture that has no style, and for what `plan_tensors` finds.
    """
    if quant not in FORMS:
        raise ExportError(f"--quant {quant} is not for decoders. Expected one of {', '.join(FORMS)}.")
    checkpoint = read_checkpoint(folder)
    mapping = find_mapping(checkpoint.config)
    if mapping.name not in styles():
        raise ExportError(
            f"{folder}: {mapping.name} cannot become ONNX. Expected one of {', '.join(styles())}; GGUF can "
            "hold this one: give -o a name that ends in .gguf."
        )
    values = complete_config(mapping, checkpoint.config)
    plan = plan_tensors(mapping, checkpoint, values, {})
    config = _config(folder)
    if not mapping.rope.partial:
        _check_whole_heads(config, mapping.name)
    tensors = {tensor.name: replace(tensor, permute_heads=None) for tensor in plan.tensors}
    writer = _Writer(config, tensors, styles()[mapping.name], FORMS[quant], scratch, progress)
    graph = writer.build(_metadata(config, mapping.name))
    parameters = sum(tensor.num_elements for tensor in plan.tensors)
    return Decoder(graph, mapping.name, parameters, writer.num_packed, writer.notes)


def _config(folder: Path) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"transformers cannot read {folder / 'config.json'}: {' '.join(str(error).split())[:400]}"
        ) from error
    return config.get_text_config(decoder=True)


def _check_whole_heads(config: Any, architecture: str) -> None:
    """transformers turns whole heads in most architectures, whatever the config says."""
    by_layer = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for parameters in by_layer or [config.rope_parameters]:
        if parameters.get("partial_rotary_factor") not in (None, 1):
            raise ExportError(
                f"config.json: partial_rotary_factor is {parameters['partial_rotary_factor']}, expected 1: "
                f"transformers rotates whole heads in {architecture}."
            )


def _metadata(config: Any, architecture: str) -> dict[str, str]:
    """What a program that generates text wants to know, as the model's key-value pairs."""
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    facts = {
        "edgeinfer.task": "text-generation",
        "edgeinfer.architecture": architecture,
        "edgeinfer.context_length": config.max_position_embeddings,
        "edgeinfer.vocab_size": config.vocab_size,
        **{f"edgeinfer.{name}": value for name, value in ids.items() if value is not None},
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


class _Writer:
    def __init__(
        self,
        config: Any,
        tensors: dict[str, PlannedTensor],
        style: Style,
        form: Form,
        scratch: Scratch,
        progress: Callable[[float], None] | None,
    ):
        self._config = config
        self._tensors = tensors
        self._style = style
        self._form = form
        self._scratch = scratch
        self._progress = progress
        self._kind = form.computed
        self._b = Builder(Weights(scratch.path.parent))
        self._layers = config.num_hidden_layers
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads
        self._head = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._ropes: dict[str | None, tuple[Rope, tuple[str, str]]] = {}
        self.num_packed = 0

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(rope.note for rope, _ in self._ropes.values() if rope.note))

    def build(self, metadata: dict[str, str]) -> OnnxGraph:
        b = self._b
        b.input("input_ids", INT64, ["batch_size", "sequence_length"])
        b.input("attention_mask", INT64, ["batch_size", "past_sequence_length + sequence_length"])
        for layer in range(self._layers):
            for part in ("key", "value"):
                shape = ["batch_size", self._kv_heads, "past_sequence_length", self._head]
                b.input(f"past_key_values.{layer}.{part}", self._kind, shape)
        self._lengths()
        hidden = self._embed()
        for layer in range(self._layers):
            hidden = self._layer(layer, hidden)
            if self._progress is not None:
                self._progress((layer + 1) / (self._layers + 1))
        self._logits(hidden)
        for layer in range(self._layers):
            for part in ("key", "value"):
                shape = ["batch_size", self._kv_heads, "past_sequence_length + sequence_length", self._head]
                b.output(f"present.{layer}.{part}", self._kind, shape)
        return b.finish("decoder", _OPSETS, _IR_VERSION, metadata)

    def _lengths(self) -> None:
        """total, the number of tokens; last, each row's last position; positions of the tokens now."""
        b = self._b
        one = b.constant("one", [1], np.int64)
        size = b.op("Shape", ["attention_mask"], "mask_size")
        total = b.op("Gather", [size, b.constant("axis_1", 1, np.int64)], "total")
        self._total = b.op("Cast", [total], "total_sequence_length", to=INT32)
        count = b.op("ReduceSum", ["attention_mask", one], "num_tokens", keepdims=0)
        last = b.op("Sub", [count, one], "last_position")
        self._last = b.op("Cast", [last], "seqlens_k", to=INT32)
        counted = b.op("CumSum", ["attention_mask", b.constant("axis_1", 1, np.int64)], "counted")
        every = b.op("Sub", [counted, one], "all_positions")
        now = b.op("Shape", ["input_ids"], "num_now", start=1, end=2)
        end = b.constant("end", [np.iinfo(np.int64).max], np.int64)
        found = b.op("Slice", [every, b.op("Neg", [now], "minus_now"), end, one], "position_ids")
        apart = b.op("Unsqueeze", [found, b.constant("axis_2", [2], np.int64)], "positions")
        self._positions = b.op("Cast", [apart], "positions_float", to=FLOAT)

    def _embed(self) -> str:
        b, tensor = self._b, self._tensors[EMBEDDING]
        hidden = b.op("Gather", [b.weight(*plain(tensor, self._form.table)), "input_ids"], "embed")
        if self._form.table != self._kind:
            hidden = b.op("Cast", [hidden], "embed_cast", to=self._kind)
        if self._style.scale_embedding:
            scale = self._number("embed_scale", self._config.hidden_size**0.5)
            hidden = b.op("Mul", [hidden, scale], "embed_scaled")
        return hidden

    def _number(self, name: str, value: float) -> str:
        return self._b.constant(name, value, np.float16 if self._kind == HALF else np.float32)

    def _layer(self, layer: int, hidden: str) -> str:
        b, name, block = self._b, f"layers.{layer}", f"blk.{layer}"
        found = self._norm(hidden, f"{block}.attn_norm", f"{name}.attn_norm")
        found = self._attention(layer, found)
        found = self._norm(found, f"{block}.post_attention_norm", f"{name}.post_attn_norm")
        hidden = b.op("Add", [hidden, found], f"{name}.attn_residual")
        found = self._norm(hidden, f"{block}.ffn_norm", f"{name}.ffn_norm")
        found = self._feed_forward(block, found, name)
        found = self._norm(found, f"{block}.post_ffw_norm", f"{name}.post_ffn_norm")
        return b.op("Add", [hidden, found], f"{name}.ffn_residual")

    def _norm(self, values: str, tensor: str, name: str) -> str:
        """Root mean square norm, where the architecture has this one."""
        found = self._tensors.get(f"{tensor}.weight")
        if found is None:
            return values
        weight = self._b.weight(*plain(found, self._kind))
        epsilon = self._config.rms_norm_eps
        return self._b.op("RMSNormalization", [values, weight], name, axis=-1, epsilon=epsilon)

    def _linear(self, values: str, tensor: str, name: str) -> str:
        found = self._tensors[f"{tensor}.weight"]
        bias = self._tensors.get(f"{tensor}.bias")
        result = f"{name}.product" if bias else name
        if self._form.matrices is None:
            result = self._b.op("MatMul", [values, self._b.weight(*transposed(found, self._kind))], result)
        else:
            result = self._packed(values, found, result, self._form.matrices)
        return self._b.op("Add", [result, self._b.weight(*plain(bias, self._kind))], name) if bias else result

    def _packed(self, values: str, tensor: PlannedTensor, result: str, form: BlockFormat) -> str:
        count, width = tensor.shape
        matrix = pack(
            weight_name(tensor), (width, count), lambda a, b: rows(tensor, a, b).T, form, self._scratch
        )
        for header, source in matrix.tensors:
            self._b.weight(header, source)
        self._b.add(matrix.node(result, values, result))
        self.num_packed += 1
        return result

    def _attention(self, layer: int, values: str) -> str:
        b, name, block = self._b, f"layers.{layer}.attn", f"blk.{layer}"
        query, key, value = self._projections(block, values, name)
        rope, (cos, sin) = self._rope(layer)
        query = self._turn(query, self._heads, f"{block}.attn_q_norm", f"{name}.q", rope, cos, sin)
        key = self._turn(key, self._kv_heads, f"{block}.attn_k_norm", f"{name}.k", rope, cos, sin)
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        inputs = [query, key, value, *past, self._last, self._total]
        results = [f"{name}.attended", *present]
        found = b.ops("GroupQueryAttention", inputs, results, DOMAIN, **self._attention_settings(layer))[0]
        return self._linear(found, f"{block}.attn_output", f"{name}.o_proj")

    def _projections(self, block: str, values: str, name: str) -> list[str]:
        results = [f"{name}.{part}_proj" for part in ("q", "k", "v")]
        if f"{block}.attn_qkv.weight" not in self._tensors:
            parts = [f"{block}.attn_{part}" for part in ("q", "k", "v")]
            return [self._linear(values, tensor, result) for tensor, result in zip(parts, results)]
        found = self._linear(values, f"{block}.attn_qkv", f"{name}.qkv_proj")
        sizes = [heads * self._head for heads in (self._heads, self._kv_heads, self._kv_heads)]
        return self._b.ops("Split", [found, self._b.constant("qkv_sizes", sizes, np.int64)], results, axis=-1)

    def _rope(self, layer: int) -> tuple[Rope, tuple[str, str]]:
        """Cosine and sine, made once for all layers of a type."""
        kind = self._layer_type(layer)
        kind = kind if kind in self._config.rope_parameters else None
        if kind not in self._ropes:
            rope = read_rope(self._config, kind)
            name = f"rope.{kind}" if kind else "rope"
            self._ropes[kind] = rope, cos_and_sin(self._b, rope, self._positions, name, self._kind)
        return self._ropes[kind]

    def _layer_type(self, layer: int) -> str | None:
        types = getattr(self._config, "layer_types", None)
        return types[layer] if types else None

    def _turn(self, values: str, heads: int, norm: str, name: str, rope: Rope, cos: str, sin: str) -> str:
        b = self._b
        if f"{norm}.weight" in self._tensors:
            apart = b.constant(f"apart_{heads}", [0, 0, heads, self._head], np.int64)
            joined = b.constant(f"joined_{heads}", [0, 0, heads * self._head], np.int64)
            values = self._norm(b.op("Reshape", [values, apart], f"{name}.heads"), norm, f"{name}.norm")
            values = b.op("Reshape", [values, joined], f"{name}.normed")
        part = {"rotary_embedding_dim": rope.rotated} if rope.rotated != self._head else {}
        return b.op("RotaryEmbedding", [values, cos, sin], f"{name}.turned", num_heads=heads, **part)

    def _attention_settings(self, layer: int) -> dict[str, Any]:
        config = self._config
        scalar = getattr(config, "query_pre_attn_scalar", None) or self._head
        settings = {"num_heads": self._heads, "kv_num_heads": self._kv_heads, "scale": float(scalar) ** -0.5}
        window = getattr(config, "sliding_window", None)
        if window and self._layer_type(layer) in (None, "sliding_attention"):
            settings["local_window_size"] = window
        if softcap := getattr(config, "attn_logit_softcapping", None):
            settings["softcap"] = float(softcap)
        return settings

    def _feed_forward(self, block: str, values: str, name: str) -> str:
        b = self._b
        if f"{block}.ffn_gate.weight" in self._tensors:
            gate = self._linear(values, f"{block}.ffn_gate", f"{name}.gate_proj")
            up = self._linear(values, f"{block}.ffn_up", f"{name}.up_proj")
        else:
            both = self._linear(values, f"{block}.ffn_up", f"{name}.gate_up_proj")
            gate, up = b.ops("Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
        product = b.op("Mul", [self._activate(gate, name), up], f"{name}.gated")
        return self._linear(product, f"{block}.ffn_down", f"{name}.down_proj")

    def _activate(self, values: str, name: str) -> str:
        if self._style.activation == "gelu_tanh":
            return self._b.op("Gelu", [values], f"{name}.gelu", approximate="tanh")
        sigmoid = self._b.op("Sigmoid", [values], f"{name}.sigmoid")
        return self._b.op("Mul", [values, sigmoid], f"{name}.silu")

    def _logits(self, hidden: str) -> None:
        b = self._b
        b.input("num_logits_to_keep", INT64, [])
        keep = b.constant("num_logits_to_keep", 0, np.int64)
        start = b.op(
            "Reshape", [b.op("Neg", [keep], "minus_keep"), b.constant("one", [1], np.int64)], "keep_from"
        )
        end, axis = b.constant("end", [np.iinfo(np.int64).max], np.int64), b.constant("one", [1], np.int64)
        hidden = b.op("Slice", [hidden, start, end, axis], "kept")
        hidden = self._norm(hidden, "output_norm", "final_norm")
        softcap = getattr(self._config, "final_logit_softcapping", None)
        name = "logits" if self._kind == FLOAT and not softcap else "logits.raw"
        found = self._output_product(hidden, name)
        if self._kind != FLOAT:
            found = b.op("Cast", [found], "logits.cast" if softcap else "logits", to=FLOAT)
        if softcap:
            limit = b.constant("logits.softcap", softcap, np.float32)
            found = b.op("Tanh", [b.op("Div", [found, limit], "logits.scaled")], "logits.tanh")
            b.op("Mul", [found, limit], "logits")
        b.output("logits", FLOAT, ["batch_size", "logits_length", self._config.vocab_size])

    def _output_product(self, hidden: str, name: str) -> str:
        """The output matrix lies as (vocabulary, hidden), as the embedding does, which it often is."""
        tensor = self._tensors.get("output.weight", self._tensors[EMBEDDING])
        if self._form.output is not None:
            return self._packed(hidden, tensor, name, self._form.output)
        weight = self._b.weight(*plain(tensor, self._kind))
        return self._b.op("FusedMatMul", [hidden, weight], name, DOMAIN, transB=1)
