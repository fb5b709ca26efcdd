"""Checkpoints of the trained models that come with edgeinfer: exported, they are those models again."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs pip install "edgeinfer[export]"')
transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from safetensors.numpy import save_file  # noqa: E402
from tiny_checkpoints import llama_logits, plain_vocabulary  # noqa: E402

from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402

MODELS = Path(__file__).parents[2] / "models"
NAMES = {  # after "blk.N."
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}
TOKENS = np.random.default_rng(0).integers(3, 4096, 120).tolist()


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)


def weights_of(path):
    """Tensor -> float32, as the gguf package reads it."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def checkpoint(name, folder):
    """The model as transformers keeps it: rotary halves apart, experts one by one."""
    fields = gguf.GGUFReader(MODELS / f"{name}.gguf").fields
    said = {key.removeprefix("llama."): field.contents() for key, field in fields.items()}
    heads = {"attn_q.weight": said["attention.head_count"], "attn_k.weight": said["attention.head_count_kv"]}
    tensors = {}
    for name_, array in weights_of(MODELS / f"{name}.gguf").items():
        layer, _, rest = name_.removeprefix("blk.").partition(".")
        prefix = f"model.layers.{layer}."
        if rest in heads:
            array = array.reshape(heads[rest], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if rest in EXPERTS:
            for expert, matrix in enumerate(array):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{EXPERTS[rest]}.weight"] = matrix
        elif name_.startswith("blk."):
            tensors[prefix + NAMES[rest]] = array
        else:
            tensors[OUTSIDE[name_]] = array
    experts = said.get("expert_count", 0)
    config = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "vocab_size": said["vocab_size"],
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said["attention.head_count"],
        "num_key_value_heads": said["attention.head_count_kv"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": said["attention.layer_norm_rms_epsilon"],
        "rope_theta": said["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": said["expert_used_count"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["story", "story-moe"])
def test_weights_and_logits(name, tmp_path):
    folder = checkpoint(name, tmp_path / "in")
    export_gguf(folder, tmp_path / "out.gguf")
    expected, found = weights_of(MODELS / f"{name}.gguf"), weights_of(tmp_path / "out.gguf")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    for type, most in (("F32", 1e-4), ("F16", 3e-3)):
        export_gguf(folder, tmp_path / f"{type}.gguf", type)
        difference = np.abs(llama_logits(tmp_path / f"{type}.gguf", TOKENS) - logits).max(axis=1)
        # rounding may choose another expert at a few positions
        judged = np.median(difference) if name == "story-moe" and type == "F16" else difference.max()
        assert judged < most * np.abs(logits).max()
