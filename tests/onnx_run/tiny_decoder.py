"""A tiny random llama of transformers, and the same weights as ONNX decoders: with a cache that grows by
Concat, and with one that GroupQueryAttention writes in place. The tokenizer is byte-level BPE, learned from a
few sentences."""

import json

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS, SIZE, CONTEXT = 2, 4, 2, 16, 128
HIDDEN = HEADS * SIZE
TEXTS = [
    "Once upon a time there was a little girl.",
    "The naïve fox — über all — ran 12 miles.",
    "日本語も少し。",
] * 3


def write_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def tiny_llama(vocabulary, layers=LAYERS, feed_forward=96):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=SIZE,
        max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class _Graph:
    def __init__(self):
        self.nodes, self.constants, self.inputs, self.outputs = [], [], [], []

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def __call__(self, kind, *inputs, out=None, domain="", outputs=1, **attributes):
        names = (
            [out]
            if isinstance(out, str)
            else out or [f"{kind}_{len(self.nodes)}_{at}" for at in range(outputs)]
        )
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names


def write_decoder(folder, llama, in_place):
    """decoder.onnx with Optimum's names, and config.json beside it."""
    graph, weights = _Graph(), {name: value.detach().numpy() for name, value in llama.state_dict().items()}
    ids, rank = TensorProto.INT64, helper.make_tensor_value_info
    graph.inputs += [rank("input_ids", ids, [1, "tokens"]), rank("attention_mask", ids, [1, "total"])]
    angles = np.outer(np.arange(CONTEXT), 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE))
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        graph.constant(name, table.astype(np.float32))
    x = graph("Gather", graph.constant("embedding", weights["model.embed_tokens.weight"]), "input_ids")
    if in_place:
        total = graph("ReduceSum", "attention_mask", graph.constant("axis", np.array([1])), keepdims=0)
        last = graph("Sub", total, graph.constant("one", np.array(1)))
        extra = [graph("Cast", last, to=TensorProto.INT32)]
        count = graph("Gather", graph("Shape", "attention_mask"), "one", axis=0)
        extra.append(graph("Cast", count, to=TensorProto.INT32))
    else:
        graph.inputs.append(rank("position_ids", ids, [1, "tokens"]))
        graph.constant("cos_full", np.concatenate([np.cos(angles)] * 2, 1).astype(np.float32))
        graph.constant("sin_full", np.concatenate([np.sin(angles)] * 2, 1).astype(np.float32))
        extra = [graph("Gather", name, "position_ids") for name in ("cos_full", "sin_full")]
    for layer in range(llama.config.num_hidden_layers):
        x = _layer(graph, weights, layer, x, extra, in_place)
    x = _norm(graph, "norm", weights["model.norm.weight"], x)
    if in_place:  # an input with a default: for how many of the last tokens, 0 for all
        keep = graph.constant("num_logits_to_keep", np.array(0))
        graph.inputs.append(rank(keep, ids, []))
        first = graph("Reshape", graph("Neg", keep), graph.constant("vector", np.array([1])))
        end = graph.constant("end", np.array([2**31 - 1]))
        x = graph("Slice", x, first, end, graph.constant("token_axis", np.array([1])))
    graph("MatMul", x, graph.constant("head", weights["lm_head.weight"].T), out="logits")
    graph.outputs.insert(0, rank("logits", TensorProto.FLOAT, [1, "logits", llama.config.vocab_size]))
    made = helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, graph.constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=8), str(folder / "decoder.onnx"))
    facts = {"eos_token_id": 1, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder / "decoder.onnx"


def _norm(graph, name, weight, x):
    epsilon = graph.constant(f"{name}_epsilon", np.float32(1e-6))
    square = graph("ReduceMean", graph("Mul", x, x), axes=[-1])
    normed = graph("Div", x, graph("Sqrt", graph("Add", square, epsilon)))
    return graph("Mul", normed, graph.constant(f"{name}_weight", weight))


def _layer(graph, weights, layer, x, extra, in_place):
    prefix = f"model.layers.{layer}."

    def product(name, value):
        return graph("MatMul", value, graph.constant(f"{layer}.{name}", weights[f"{prefix}{name}.weight"].T))

    def cache(side, part):
        return f"past_key_values.{layer}.{part}" if side == "past" else f"present.{layer}.{part}"

    for side, ports in (("past", graph.inputs), ("present", graph.outputs)):
        for part in ("key", "value"):
            shape = [1, KV_HEADS, f"{side}_length", SIZE]
            ports.append(helper.make_tensor_value_info(cache(side, part), TensorProto.FLOAT, shape))
    normed = _norm(graph, f"{layer}.in", weights[prefix + "input_layernorm.weight"], x)
    q, k, v = (product(f"self_attn.{part}_proj", normed) for part in "qkv")
    past = [cache("past", part) for part in ("key", "value")]
    present = [cache("present", part) for part in ("key", "value")]
    if in_place:
        mixed = graph(
            "GroupQueryAttention", q, k, v, *past, *extra, "cos", "sin", out=[f"mixed{layer}", *present],
            domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )[0]  # fmt: skip
    else:
        mixed = _attention(graph, layer, q, k, v, past, present, extra)
    x = graph("Add", x, product("self_attn.o_proj", mixed))
    normed = _norm(graph, f"{layer}.post", weights[prefix + "post_attention_layernorm.weight"], x)
    gate, up = product("mlp.gate_proj", normed), product("mlp.up_proj", normed)
    active = graph("Mul", graph("Mul", gate, graph("Sigmoid", gate)), up)
    return graph("Add", x, product("mlp.down_proj", active))


def _attention(graph, layer, q, k, v, past, present, extra):
    """Plain operators: rotate, append to the cache, attend with a causal mask."""
    cos, sin = (
        graph("Unsqueeze", table, graph.constant(f"{layer}.{at}.axis", np.array([1])))
        for at, table in enumerate(extra)
    )

    def heads(value, count, name):
        shape = graph.constant(f"{layer}.{name}.shape", np.array([1, -1, count, SIZE]))
        return graph("Transpose", graph("Reshape", value, shape), perm=[0, 2, 1, 3])

    def rotated(value, name):
        first, second = graph(
            "Split", value, graph.constant(f"{layer}.{name}.halves", np.array([8, 8])), outputs=2, axis=-1
        )
        turned = graph("Concat", graph("Neg", second), first, axis=-1)
        return graph("Add", graph("Mul", value, cos), graph("Mul", turned, sin))

    q = rotated(heads(q, HEADS, "q"), "q")
    k = graph("Concat", past[0], rotated(heads(k, KV_HEADS, "k"), "k"), axis=2, out=present[0])
    v = graph("Concat", past[1], heads(v, KV_HEADS, "v"), axis=2, out=present[1])
    repeat = graph.constant(f"{layer}.repeat", np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS))
    keys, values = graph("Gather", k, repeat, axis=1), graph("Gather", v, repeat, axis=1)
    scale = graph.constant(f"{layer}.scale", np.float32(SIZE**-0.5))
    scores = graph("Mul", graph("MatMul", q, graph("Transpose", keys, perm=[0, 1, 3, 2])), scale)
    one, zero = (graph.constant(f"{layer}.{value}", np.array(value)) for value in (1, 0))
    total = graph("Gather", graph("Shape", "attention_mask"), one, axis=0)
    columns = graph("Range", zero, total, one)
    rows = graph("Transpose", "position_ids", perm=[1, 0])
    later = graph("Cast", graph("Greater", columns, rows), to=TensorProto.FLOAT)
    hidden = graph("Mul", later, graph.constant(f"{layer}.far", np.float32(-1e9)))
    weights = graph("Softmax", graph("Add", scores, hidden), axis=-1)
    mixed = graph("Transpose", graph("MatMul", weights, values), perm=[0, 2, 1, 3])
    return graph("Reshape", mixed, graph.constant(f"{layer}.flat", np.array([1, -1, HIDDEN])))
