"""Streamed logits equal stock llama.cpp's bit for bit: every position of prefill, and decode."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from streaming import (
    build_shim,
    shim_environment,
    some_tokens,
    stock_logits,
    streamed_logits,
    streaming_engine,
)
from tiny import tiny_model

ARCHITECTURES = ["llama", "llama-tied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
TYPES = ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"]
PLANS = ["everything", "alternating", "largest"]

# Kernels differ with the number of rows (K-quants at 8) and attention with the length of the cache.
SHORT = {"batches": [33, 64, 7, 8, 1, 1, 1], "context_length": 256, "ubatch": 64}
LONG = {"batches": [512, 90, 1, 1, 9, 1], "context_length": 2048, "ubatch": 512, "threads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def model_of(models, arch, type):
    name, _, tied = arch.partition("-")
    return tiny_model(models, name, type, tied=True if tied else None)


def cut(lengths):
    tokens = iter(some_tokens(sum(lengths)))
    return [[next(tokens) for _ in range(length)] for length in lengths]


def run_streamed(path, kind, case, **options):
    """Logits, having seen that weights were streamed and that the ring wrapped."""
    case = dict(case)
    batches = cut(case.pop("batches"))
    with streaming_engine(path, kind, **case, **options) as engine:
        logits = streamed_logits(engine, batches)
        once_a_pass = sum(engine._paged.file.tensor(name).nbytes for name in engine.plan.streamed)
        assert engine.mode == "streaming" and once_a_pass > 0
        assert engine.statistics().passes == len(batches)
        assert engine.statistics().streamed_bytes >= once_a_pass * len(batches)
        assert engine._paged.statistics()["ring_wraps"] >= len(batches) - 1
        assert engine._paged.statistics()["reorders"] == 0
    return logits


def run_stock(path, case):
    case = dict(case)
    return stock_logits(path, cut(case.pop("batches")), **case)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == np.float32 and found.shape == expected.shape
    assert np.isfinite(expected).all() and expected.std() > 0
    different = np.flatnonzero((found != expected).any(axis=1))
    assert np.array_equal(found, expected), f"positions {different[:10]} differ"


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_of_every_position_equal_stock(models, arch, type):
    path = model_of(models, arch, type)
    expected = run_stock(path, SHORT)
    for kind in PLANS:
        assert_same_bits(run_streamed(path, kind, SHORT), expected)


@pytest.mark.parametrize(("number", "arch"), list(enumerate(ARCHITECTURES)))
def test_beyond_512_positions(models, number, arch):
    path = model_of(models, arch, TYPES[number % len(TYPES)])
    expected = run_stock(path, LONG)
    assert_same_bits(run_streamed(path, PLANS[number % len(PLANS)], LONG), expected)


@pytest.mark.parametrize("flash_attention", [False, True])
def test_with_and_without_flash_attention(models, flash_attention):
    case = {**LONG, "flash_attention": flash_attention}
    path = model_of(models, "qwen2", "Q4_0")
    assert_same_bits(run_streamed(path, "everything", case), run_stock(path, case))


# ---- the ways of reading -------------------------------------------------------------------------------


def test_buffered_reads(models):
    path = model_of(models, "llama-tied", "Q4_K")
    assert_same_bits(run_streamed(path, "everything", SHORT, direct=False), run_stock(path, SHORT))


def test_file_that_is_aligned_to_pages(models):
    path = tiny_model(models, "llama", "Q6_K", alignment=4096)
    assert_same_bits(run_streamed(path, "everything", SHORT), run_stock(path, SHORT))


def test_model_in_the_memory_of_the_machine(models):
    """tmpfs refuses O_DIRECT before Linux 6.6, and copies from the page cache since."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        pytest.skip("/dev/shm is not there or not writable")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        path = model_of(Path(directory), "qwen3", "Q8_0")
        assert_same_bits(run_streamed(path, "everything", SHORT), run_stock(path, SHORT))


def test_model_in_several_files(models, tmp_path):
    whole = model_of(models, "gemma3", "Q4_K")
    first, *others = split_file(whole, tmp_path, tensors=9)
    assert len(others) >= 3
    assert_same_bits(run_streamed(first, "everything", SHORT), run_stock(whole, SHORT))


def split_file(path, directory, tensors):
    """The same model in files of so many tensors, written by the gguf package."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    target = directory / "split.gguf"
    writer = gguf.GGUFWriter(target, arch, split_max_tensors=tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("split-*.gguf"))


@pytest.mark.parametrize(
    ("setting", "failed"),
    [("REFUSE_DIRECT", True), ("SHORT_READS", False)],
    ids=["direct reads are refused after open", "reads stop short"],
)
def test_odd_file_systems(models, tmp_path, setting, failed):
    path = model_of(models, "llama", "Q4_0")
    case = {**SHORT, "kind": "everything", "chunk_bytes": 1 << 16, "batches": cut(SHORT["batches"])}
    out = tmp_path / "logits.npy"
    script = Path(__file__).with_name("run_streamed.py")
    result = subprocess.run(
        [sys.executable, script, path, out, json.dumps(case)],
        env=shim_environment(build_shim(tmp_path), **{setting: 1, "TELL": 1}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    told = re.search(r"faulty_read: (\d+) reads, (\d+) failed", result.stderr)
    answer = json.loads(result.stdout)
    assert answer["error"] is None
    assert int(told[1]) > 100 and (int(told[2]) > 0) == failed
    assert answer["statistics"]["ring_wraps"] > 0
    assert_same_bits(np.load(out), run_stock(path, SHORT))


def test_large_vocabulary(models):
    """A file that begins with megabytes of tokens, whose address space is given back; rows are far apart."""
    path = tiny_model(models, "gemma", "Q8_0", vocabulary=40_000)
    tokens = some_tokens(64, 40_000)
    with streaming_engine(path) as engine:
        found = streamed_logits(engine, [tokens, tokens[:1]])
    assert_same_bits(found, stock_logits(path, [tokens, tokens[:1]]))


@pytest.mark.parametrize(("arch", "type"), [("olmoe", "Q4_0"), ("mixtral", "Q4_K"), ("gpt-oss", "Q8_0")])
def test_mixtures_of_experts_with_all_experts_of_a_layer_streamed(models, arch, type):
    path = tiny_model(models, arch, type)
    expected = run_stock(path, SHORT)
    for kind in PLANS:
        assert_same_bits(run_streamed(path, kind, SHORT), expected)
