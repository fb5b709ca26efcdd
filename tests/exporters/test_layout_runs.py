"""Models that were laid out anew compute what they computed: in stock llama.cpp, and streamed under a small
budget.
"""

import gguf
import numpy as np
import pytest
from streaming import some_tokens, stock_logits, streamed_logits, streaming_engine
from test_expert_cache import cached_logits, expert_engine
from tiny import tiny_model

from edgeinfer.exporters.layout import lay_out
from edgeinfer.modelfile import read_model_file

# A batch that wants many experts, then decoding: experts are missed, hit, and evicted.
BATCHES = [some_tokens(1), some_tokens(40), *([token] for token in some_tokens(30))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def laid_out(models, arch, type, **options):
    """(source, result), made once."""
    source = tiny_model(models, arch, type, layers=4, **options)
    result = source.with_suffix(".laid-out")
    if not result.exists():
        lay_out(source, result)
    return source, result


def is_merged(path):
    return any(tensor.role == "ffn_gate_up_exps" for tensor in read_model_file(path).tensors)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3", "mixtral", "gpt-oss", "grovemoe", "deepseek2"])
def test_stock_llama_computes_the_same_logits(models, arch):
    source, result = laid_out(models, arch, "Q4_0")
    assert is_merged(result) == (arch == "deepseek2")
    assert np.array_equal(stock_logits(result, BATCHES), stock_logits(source, BATCHES))


@pytest.mark.parametrize(
    ("type", "threads"), [("F32", 1), ("F16", 1), ("Q8_0", 1), ("Q4_K", 1), ("Q4_K", 2), ("Q6_K", 1)]
)
def test_merged_experts_of_every_type_compute_the_same_logits(models, type, threads):
    source, result = laid_out(models, "deepseek2", type)
    assert is_merged(result)
    expected = stock_logits(source, BATCHES, threads=threads)
    assert np.array_equal(stock_logits(result, BATCHES, threads=threads), expected)


def test_another_architecture_with_merged_experts(models, tmp_path):
    """hy_v3 is qwen3moe with shared experts, for which the weights of each layer's expert 0 serve here."""
    reader = gguf.GGUFReader(tiny_model(models, "qwen3moe", "F16"))
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "hy_v3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            renamed = name.replace("qwen3moe.", "hy_v3.")
            writer.add_key_value(renamed, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
        if tensor.name.endswith("_exps.weight"):
            writer.add_tensor(tensor.name.replace("_exps", "_shexp"), np.ascontiguousarray(tensor.data[0]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = lay_out(tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert report.merged_layers == 3 and report.order_from_graph
    expected = stock_logits(tmp_path / "in.gguf", BATCHES)
    assert np.array_equal(stock_logits(tmp_path / "out.gguf", BATCHES), expected)
    with expert_engine(tmp_path / "out.gguf", 8) as engine:
        assert np.array_equal(cached_logits(engine, BATCHES), expected)


@pytest.mark.parametrize(("type", "slots"), [("Q4_0", 8), ("Q4_0", 11), ("Q4_K", 8), ("F16", 9)])
def test_merged_experts_in_a_small_cache(models, type, slots):
    source, result = laid_out(models, "deepseek2", type)
    with expert_engine(result, slots) as engine:
        assert all(len(layer) == 2 for layer in engine.plan.pools.layers)
        found = cached_logits(engine, BATCHES)
        counted = engine.expert_statistics()
    assert np.array_equal(found, stock_logits(source, BATCHES))
    assert counted["wanted"] > counted["hits"] > 0
    assert counted["predicted_right"] > 0


def test_merged_experts_streamed_whole(models):
    source, result = laid_out(models, "deepseek2", "Q4_0")
    with streaming_engine(result, "everything") as engine:
        found = streamed_logits(engine, BATCHES)
    assert np.array_equal(found, stock_logits(source, BATCHES))


def test_a_dense_model_streamed(models):
    source, result = laid_out(models, "qwen3", "Q4_0")
    with streaming_engine(result, "everything") as engine:
        found = streamed_logits(engine, BATCHES)
    assert np.array_equal(found, stock_logits(source, BATCHES))
