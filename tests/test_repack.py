"""Repacked weights: only in ways that were tried, only where they fit, and with the right products."""

import re

import llama_cpp
import numpy as np
import pytest
from tiny import tiny_model

from edgeinfer.engines import ggml, repack
from edgeinfer.engines.llama import LlamaContext, LlamaModel
from edgeinfer.modelfile import read_model_file

TOKENS = list(range(5, 45))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def logits(path, **options):
    with (
        LlamaModel(path, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE, use_extra_bufts=False, **options) as model,
        LlamaContext(model, context_length=64, threads=2, outputs_max=64, flash_attention=False) as context,
    ):
        context.decode(TOKENS, outputs="all")
        prefill = np.stack([context.logits(i) for i in range(len(TOKENS))])
        context.decode([7])
        return np.concatenate([prefill, context.logits()[None]])


@pytest.mark.parametrize(("arch", "type"), [("llama", "Q4_0"), ("qwen2", "Q4_K"), ("phi3", "Q8_0"), ("mixtral", "Q4_0")])
def test_a_repacked_model_computes_what_the_plain_one_does(models, arch, type):
    path = tiny_model(models, arch, type)
    overrides = repack.working_overrides(read_model_file(path))
    plain, repacked = logits(path), logits(path, buffer_types=overrides)
    assert np.abs(plain - repacked).max() < 0.05 * np.abs(plain).max()
    if overrides:
        assert not np.array_equal(plain, repacked)  # other kernels round otherwise: they did run


def test_a_way_that_ends_its_process_is_not_used_and_not_tried_twice(monkeypatch):
    assert repack.runs_here("no such way", ["Q4_0"]) == {}
    monkeypatch.setattr(repack, "_try_in_child", lambda *_: pytest.fail("tried again"))
    assert repack.runs_here("no such way", ["Q4_0"]) == {}


def test_patterns_name_exactly_the_products(models):
    file = read_model_file(tiny_model(models, "llama", "Q4_0", layers=12))
    products = [tensor.name for tensor in file.tensors if repack._is_product(tensor)]
    pattern = re.compile(repack._pattern(products))
    assert [tensor.name for tensor in file.tensors if pattern.search(tensor.name)] == products
    assert "token_embd.weight" not in products and "blk.3.attn_norm.weight" not in products
    assert {"output.weight", "blk.0.attn_q.weight", "blk.11.ffn_down.weight"} <= set(products)


def test_every_way_that_runs_gives_right_products_and_takes_only_what_it_can():
    for name, number in ggml.extra_buffer_types().items():
        runs = repack.runs_here(name, ["Q4_0", "F32"])
        assert not runs.get("F32"), "plain float32 weights are never repacked"
        if runs.get("Q4_0"):
            assert repack._takes(number, "Q4_0", (4096, 4096))
            assert not repack._takes(number, "Q4_0", (4096, 3))  # no whole group of rows
