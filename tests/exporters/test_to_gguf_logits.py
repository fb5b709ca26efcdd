"""What llama.cpp computes with an exported model is what PyTorch computes with the checkpoint."""

import gguf
import numpy as np
import pytest

pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from tiny_checkpoints import (  # noqa: E402
    CONTEXT,
    GELU,
    MODELS,
    llama_logits,
    plain_vocabulary,
    relative_differences,
    tiny_checkpoint,
)

from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.order import order_of_use  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402
from edgeinfer.modelfile import read_model_file  # noqa: E402

EXACT = 1e-5  # what float32 sums in another order differ by; ten times less than what is asked for
GELU_TABLE = 1e-3  # llama.cpp looks gelu up in a table of float16
# llama.cpp rounds activations too where weights are F16 or BF16
HALF = {"F16": 3e-3, "BF16": 2e-2}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
EXPERTS = [name for name, (_, own) in MODELS.items() if "num_experts" in own or "num_local_experts" in own]


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)


def _differences(tmp_path, architecture, type=None, context=CONTEXT, **options):
    """Position by position: from PyTorch, and from PyTorch with gelu rounded as llama.cpp does."""
    tiny = tiny_checkpoint(tmp_path / "tiny", architecture, **options)
    export_gguf(tiny.folder, tmp_path / "tiny.gguf", type)
    found = llama_logits(tmp_path / "tiny.gguf", tiny.tokens, context)
    return relative_differences(found, tiny.logits), relative_differences(found, tiny.rounded)


def _check_float32(tmp_path, architecture, **options):
    true, rounded = _differences(tmp_path, architecture, "F32", **options)
    if architecture in GELU:
        assert true.max() < GELU_TABLE
        # not at every position: a number in the middle between two float16 may go either way
        assert np.median(rounded) < EXACT
    else:
        assert true.max() < EXACT


@pytest.mark.parametrize("architecture", MODELS)
def test_float32_logits_are_pytorchs(tmp_path, architecture):
    _check_float32(tmp_path, architecture)


@pytest.mark.parametrize("architecture", MODELS)
def test_tensors_are_in_the_order_of_llama_cpps_graph(tmp_path, architecture):
    tiny = tiny_checkpoint(tmp_path / "tiny", architecture)
    export_gguf(tiny.folder, tmp_path / "tiny.gguf")
    file = read_model_file(tmp_path / "tiny.gguf")
    assert ([tensor.name for tensor in file.tensors], True) == order_of_use(file, 1 << 30)
    assert all(tensor.offset % 4096 == 0 for tensor in file.tensors)


@pytest.mark.parametrize("type", HALF)
@pytest.mark.parametrize("architecture", MODELS)
def test_half_precision_logits_differ_by_its_rounding(tmp_path, architecture, type):
    # all experts are used: else rounding may choose another one
    config = {"num_experts_per_tok": 4} if architecture in EXPERTS else {}
    true, _ = _differences(tmp_path, architecture, type, **config)
    assert true.max() < HALF[type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_half_precision_checkpoints_in_shards(tmp_path, architecture, dtype):
    """In float32 they give what PyTorch computes in float32; in their own type, the same weights exactly."""
    _check_float32(tmp_path, architecture, dtype=dtype, shard_size="100KB")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 1
    report = export_gguf(tmp_path / "tiny", tmp_path / "own.gguf")
    assert report.type == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    for wide, own in zip(*(gguf.GGUFReader(tmp_path / name).tensors for name in ("tiny.gguf", "own.gguf"))):
        numbers = gguf.quants.dequantize(own.data, own.tensor_type).reshape(wide.data.shape)
        np.testing.assert_array_equal(numbers, wide.data, err_msg=own.name)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_fused_experts_as_transformers_5_keeps_them(tmp_path, architecture):
    _check_float32(tmp_path, architecture, original_format=False)


@pytest.mark.parametrize(
    "architecture, config",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2moe", {"tie_word_embeddings": True, "qkv_bias": False}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("qwen3moe", {"num_experts_per_tok": 3}),
        ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48}),
    ],
)
def test_variants_of_an_architecture(tmp_path, architecture, config):
    _check_float32(tmp_path, architecture, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ],
)
def test_variants_of_gemma2(tmp_path, config):
    _check_float32(tmp_path, "gemma2", **config)


@pytest.mark.parametrize(
    "config",
    [
        {"final_logit_softcapping": 3.0},
        {"tie_word_embeddings": False},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ],
)
def test_variants_of_gemma3(tmp_path, config):
    _check_float32(tmp_path, "gemma3", **config)


@pytest.mark.parametrize(
    "architecture, rope",
    [
        *(
            (architecture, LINEAR)
            for architecture in ("llama", "mixtral", "qwen2", "qwen3moe", "olmoe", "gemma2")
        ),
        *(
            (architecture, YARN)
            for architecture in ("llama", "mistral", "qwen2", "qwen3", "qwen2moe", "olmoe")
        ),
        ("qwen3", {**YARN, "attention_factor": 1.7}),
        ("llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
        ("llama", LLAMA3),
        ("mixtral", {**LLAMA3, "original_max_position_embeddings": 32}),
        ("llama", {**LONGROPE, "original_max_position_embeddings": 512}),
        ("phi3", LONGROPE),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
        ("llama", {"rope_type": "default", "rope_theta": 123.0}),
    ],
)
def test_rope_scaling(tmp_path, architecture, rope):
    _check_float32(tmp_path, architecture, positions=40, rope_parameters={"rope_theta": 10000.0, **rope})


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
@pytest.mark.parametrize("context, positions", [(256, 40), (512, 300)])
def test_longrope_on_both_sides_of_the_original_context(tmp_path, architecture, context, positions):
    rope = {**LONGROPE, "original_max_position_embeddings": 256}
    extra = {"original_max_position_embeddings": 256} if architecture == "phi3" else {}
    _check_float32(
        tmp_path,
        architecture,
        context=context,
        positions=positions,
        max_position_embeddings=1024,
        rope_parameters=rope,
        **extra,
    )


def test_a_part_of_each_head_is_rotated_as_in_phi4_mini(tmp_path):
    rope = {**LONGROPE, "partial_rotary_factor": 0.75}
    rope |= {name: rope[name][:6] for name in ("short_factor", "long_factor")}
    _check_float32(tmp_path, "phi3", rope_parameters=rope)
