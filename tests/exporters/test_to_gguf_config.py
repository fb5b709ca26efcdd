"""Mapping files and configs: names, defaults and forms, and what llama.cpp cannot compute."""

import random

import gguf
import pytest

transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from tiny_checkpoints import MODELS  # noqa: E402

from edgeinfer.errors import ExportError  # noqa: E402
from edgeinfer.exporters.hyperparameters import complete_config, gguf_metadata, window_notes  # noqa: E402
from edgeinfer.exporters.mapping import find_mapping, mapping_names, parse_mapping, read_mapping  # noqa: E402
from edgeinfer.exporters.rope import read_rope  # noqa: E402

# ---- mapping files ---------------------------------------------------------------------------------------


def test_every_architecture_that_is_promised_has_a_mapping():
    promised = "llama mistral mixtral qwen2 qwen3 qwen2moe qwen3moe olmoe gemma2 gemma3 phi3"
    assert mapping_names() == sorted(promised.split()) == sorted(MODELS)


@pytest.mark.parametrize("name", mapping_names())
def test_names_are_those_that_the_gguf_package_gives(name):
    mapping = read_mapping(name)
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == mapping.gguf)
    known = gguf.get_tensor_name_map(arch, 1)
    for rule in mapping.tensors:
        for source in rule.sources:
            if "{expert}" not in source.name and "mlp.experts" not in source.name:
                found = known.get_name(source.name.replace("{layer}", "0"), try_suffixes=(".weight", ".bias"))
                never_written = name == "gemma2" and rule.tied
                assert found == rule.name.replace("{layer}", "0") or never_written


@pytest.mark.parametrize("name", mapping_names())
def test_defaults_are_transformers(name):
    mapping = read_mapping(name)
    cls = getattr(transformers, MODELS[name][0]).config_class
    config = cls()
    renamed = {"sliding_window_pattern": "_sliding_window_pattern"}
    for key, value in mapping.defaults.items():
        if not (isinstance(value, str) and value.startswith("=")) and hasattr(config, renamed.get(key, key)):
            expected = getattr(config, renamed.get(key, key))
            assert value == expected or (value is None and not expected), key


@pytest.mark.parametrize(
    "change, words",
    [
        ({"more": 1}, "unknown keys more"),
        (
            {"tensors": [{"name": "a", "from": "b", "shape": [1], "transpose": True}]},
            "a: unknown keys transpose",
        ),
        ({"tensors": [{"name": "a", "from": "b", "shape": ["2*"]}]}, "cannot read the expression"),
        ({"tensors": [{"name": "a", "from": {"fused": "b", "half": 2}, "shape": [1]}]}, "half of 0 or 1"),
        ({"tensors": [{"name": "a", "from": "b", "shape": [1], "tied": "x"}]}, "must be omit, copy or only"),
        ({"metadata": {"x": {"double": "y"}}}, "x: unknown keys double"),
        ({"require": [{"key": "x", "value": 1}]}, "require: unknown keys value"),
        ({"rope": {"types": ["default"], "base": 1}}, "rope: unknown keys base"),
        ({"rope": {"types": ["alibi"]}}, "rope types .'alibi'. are unknown"),
    ],
)
def test_mistakes_in_a_mapping_are_refused(change, words):
    good = {"gguf": "llama", "classes": ["X"], "tensors": [], "rope": {"types": ["default"]}}
    parse_mapping("good", good)
    with pytest.raises(ValueError, match=words):
        parse_mapping("bad", {**good, **change})


# ---- configs ---------------------------------------------------------------------------------------------


def _metadata(config):
    mapping = find_mapping(config)
    values = complete_config(mapping, config)
    rope = read_rope(values, mapping.rope)
    window_notes(mapping, values)
    return gguf_metadata(mapping, values, rope), {name: list(array) for name, array in rope.tensors.items()}


COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 360,
    "max_position_embeddings": 512,
}
LONG = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
OLD_FORMS = {
    "llama": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "num_key_value_heads": "absent",
        },
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, "head_dim": 16},
    ),
    "qwen2": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen3moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "rope_parameters": None},
    ),
    "gemma2": (
        {"head_dim": 32, "query_pre_attn_scalar": 32, "hidden_activation": None, "hidden_act": "gelu"},
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
        },
    ),
    "gemma3": (
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "rope_theta": 2e6,
            "rope_local_base_freq": 700.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
            + ["sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 700.0, "rope_type": "default"},
            },
        },
    ),
    "phi3": (
        {"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 128},
        {"rope_parameters": {"rope_type": "longrope", **LONG}, "original_max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize("name", OLD_FORMS)
def test_old_configs_mean_what_new_ones_mean(name):
    both = []
    for form in OLD_FORMS[name]:
        config = {"architectures": [MODELS[name][0]], **COMMON, **form}
        both.append(_metadata({key: value for key, value in config.items() if value != "absent"}))
    assert both[0] == both[1]


def test_rope_of_gemma3_without_types_of_layers_is_not_seen_as_by_transformers():
    transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')
    flat = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}
    theirs = transformers.Gemma3TextConfig(**flat).rope_parameters
    assert theirs["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    config = {"architectures": ["Gemma3ForCausalLM"], **COMMON, "head_dim": 32, "query_pre_attn_scalar": 32}
    assert _metadata({**config, **flat}) == _metadata(config)


def test_model_type_stands_in_for_architectures():
    assert find_mapping({"model_type": "qwen3_moe"}).name == "qwen3moe"


@pytest.mark.parametrize(
    "config",
    [{"architectures": ["BloomForCausalLM"]}, {"model_type": "bloom"}, {}, {"architectures": "Llama"}],
)
def test_unknown_architectures_get_the_known_ones(config):
    with pytest.raises(
        ExportError, match="is unknown. Known are Gemma2ForCausalLM, .*LlamaForCausalLM, .*Qwen3Moe"
    ):
        find_mapping(config)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu': llama.cpp computes silu"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized already .gptq."),
        (
            "llama",
            {"num_attention_heads": 5},
            "hidden_size/num_attention_heads must be a whole number, found 64 / 5",
        ),
        ("llama", {"hidden_size": "absent"}, "has no 'hidden_size'"),
        ("llama", {"num_hidden_layers": -1}, "must be a whole number from 1, found '-1'"),
        ("llama", {"num_hidden_layers": 2.5}, "must be a whole number from 1"),
        ("llama", {"rms_norm_eps": "x"}, "'rms_norm_eps' must be a number"),
        ("llama", {"rms_norm_eps": None}, "'rms_norm_eps' must be a number, found 'None'"),
        ("llama", {"rope_theta": 1e300}, "'rope_theta' must be a number above 0 that float32 can hold"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1e39}}, "'factor' must be a number .* 1e.39"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1e20}},
            "'original_max_position_embeddings' must be a count of tokens from 2",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", **LONG, "original_max_position_embeddings": 1}},
            "must be a count of tokens from 2, found 1",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1e39] * 8}},
            "long_factor of longrope must be 8 numbers above 0",
        ),
        (
            "olmoe",
            {"num_experts": 4, "num_experts_per_tok": 8},
            "num_experts_per_tok is 8, expected at most num_experts, which is 4",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "ntk"}},
            "rope type 'ntk' is not among those .*: default, linear",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope parameter 'factor' must be a number above 0"),
        ("llama", {"rope_scaling": "yarn"}, "expected an object"),
        ("llama", {"partial_rotary_factor": 0.5}, "8 of a head's 16 dimensions are rotated"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}},
            "beta_fast 16; llama.cpp",
        ),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate false"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1]}},
            "long_factor of longrope must",
        ),
        ("qwen2", {"head_dim": 32}, "num_attention_heads.head_dim is 128, expected hidden_size, which is 64"),
        ("qwen2", {"rope_scaling": {"type": "llama3", "factor": 8}}, "rope type 'llama3' is not among"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is 'True', expected False: llama.cpp never"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is 'False', expected True: llama.cpp always"),
        ("qwen3moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "experts in every layer"),
        ("qwen3moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}, "experts in every layer"),
        ("olmoe", {"num_key_value_heads": 2}, "no shared key and value heads"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is '8.0', expected None"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 100},
            "query_pre_attn_scalar is 100, expected head_dim, which is 256",
        ),
        ("gemma2", {"tie_word_embeddings": False}, "no other output matrix"),
        ("gemma3", {"use_bidirectional_attention": True}, "earlier tokens only"),
        ("gemma3", {"num_hidden_layers": 62}, "query_pre_attn_scalar is 256, expected .*which is 16"),
        ("gemma3", {"layer_types": ["full_attention"]}, "must name the type of each of 7 layers"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "layer_types has chunked_attention"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(name, change, words):
    config = {"architectures": [MODELS[name][0]], **COMMON, **change}
    with pytest.raises(ExportError, match=words):
        _metadata({key: value for key, value in config.items() if value != "absent"})


ODD = [
    None,
    -1,
    0,
    1,
    7,
    1e30,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    {},
    True,
    False,
    1 << 100,
    [1],
    {"a": 1},
]
ODD += [0.5, ["sliding_attention"] * 2, "=hidden_size", {"full_attention": 3}, {"rope_type": "yarn"}]
ODD += [
    {"rope_type": [1]},
    {"rope_type": "llama3", "factor": "x"},
    {"type": "longrope", "long_factor": [None] * 8},
]
ROPE_KEYS = ["rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"]


@pytest.mark.parametrize("name", mapping_names())
def test_odd_values_are_taken_or_refused_but_never_escape(name):
    mapping, chance = read_mapping(name), random.Random(7)
    base = {"architectures": [MODELS[name][0]], **COMMON}
    keys = [*base, *mapping.defaults, *ROPE_KEYS, "layer_types", "sliding_window", "text_config"]
    refused = 0
    for _ in range(400):
        config = {**base, **{key: chance.choice(ODD) for key in chance.sample(keys, 2)}}
        try:
            _metadata(config)
        except ExportError:
            refused += 1
    assert 0 < refused < 400
