"""Streaming under the tests' control: plans made by hand, and stock llama.cpp's logits to compare with.

Tiny models fit any real budget, so the tests say themselves what is streamed and how large the ring is.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from edgeinfer.engines.gguf import GGUFEngine
from edgeinfer.engines.llama import LlamaContext, LlamaModel
from edgeinfer.engines.opening import Prepared
from edgeinfer.modelfile import read_model_file
from edgeinfer.plan import Plan, WeightUse, smallest_ring

TABLE = "token_embd.weight"


def make_plan(kind: str, uses: Sequence[WeightUse], **options: object) -> Plan:
    """A plan that streams "everything" it can, every other weight ("alternating"), or the "largest" three.

    The ring holds the largest streamed weight and the next one, or (alternating) only the largest.
    """
    sizes = {use.name: use.nbytes for use in uses}
    views = {use.name for use in uses if use.through_view}
    looked_up = {use.name for use in uses if use.rows}
    multiplied = [name for name in sizes if any(use.name == name and not use.rows for use in uses)]
    free = [name for name in multiplied if name not in views]
    rows = looked_up & {TABLE}
    if kind == "everything":
        streamed, chunk, readers = set(free), 4096, 4
        ring = smallest_ring(sorted(sizes[name] for name in streamed))
    elif kind == "alternating":
        streamed, chunk, readers = set(free[::2]) - looked_up, 65536, 1
        ring = smallest_ring([sizes[name] for name in streamed]) // 2
        rows = frozenset()
    else:
        streamed, chunk, readers = set(sorted(free, key=sizes.get)[-3:]), 16384, 3
        ring = smallest_ring([sizes[name] for name in streamed])
    values = {
        "mode": "streaming",
        "resident": frozenset(sizes) - streamed - (rows - set(multiplied)),
        "streamed": frozenset(streamed),
        "rows": frozenset(rows),
        "ring_bytes": -(-ring // 4096) * 4096,
        "chunk_bytes": chunk,
        "reading_threads": readers,
    }
    return Plan(**(values | options))


@contextlib.contextmanager
def streaming_engine(
    path: Path,
    kind: str = "everything",
    *,
    context_length: int = 256,
    ubatch: int = 64,
    threads: int = 1,
    outputs: str = "all",
    flash_attention: bool | None = None,
    **plan_options: object,
) -> Iterator[GGUFEngine]:
    """An engine that streams `path` by the plan of this kind; its passes keep the logits of all positions."""
    options = {"context_length": context_length, "threads": threads, "ubatch": ubatch}
    options |= {"flash_attention": flash_attention, "outputs_max": ubatch if outputs == "all" else 1}
    prepared = Prepared(read_model_file(path), **options)
    try:
        engine = prepared.start(make_plan(kind, prepared.uses, **plan_options))
    except BaseException:
        prepared.close()
        raise
    engine.outputs = outputs
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def stock_context(
    path: Path,
    *,
    context_length: int = 256,
    ubatch: int = 64,
    threads: int = 1,
    flash_attention: bool | None = None,
) -> Iterator[LlamaContext]:
    """Stock llama.cpp on the same kernels: no callback, weights mapped, nothing repacked."""
    options = {"load_mode": llama_cpp.LLAMA_LOAD_MODE_MMAP, "use_extra_bufts": False}
    with LlamaModel(path, **options) as model:
        with LlamaContext(
            model,
            context_length=context_length,
            ubatch=ubatch,
            threads=threads,
            outputs_max=ubatch,
            flash_attention=flash_attention,
        ) as context:
            yield context


def some_tokens(count: int, vocabulary: int = 512) -> list[int]:
    """The same ids every time, from all over the vocabulary."""
    return [1 + (i * 7919 + i // 7) % (vocabulary - 1) for i in range(count)]


def stock_logits(path: Path, batches: Sequence[Sequence[int]], **options: object) -> np.ndarray:
    """float32 (tokens, vocabulary): logits of every position, computed batch by batch."""
    with stock_context(path, **options) as context:
        logits = []
        for batch in batches:
            context.decode(batch, outputs="all")
            logits += [context.logits(i).copy() for i in range(len(batch))]
    return np.stack(logits)


def streamed_logits(engine: GGUFEngine, batches: Sequence[Sequence[int]]) -> np.ndarray:
    """The same from an engine that keeps all positions."""
    logits = []
    for batch in batches:
        engine.prefill(batch)
        logits += [engine.context.logits(i).copy() for i in range(len(batch))]
    return np.stack(logits)


def stock_greedy(path: Path, prompt: Sequence[int], count: int, **options: object) -> list[int]:
    """`count` tokens after `prompt`, each the most probable one."""
    tokens = []
    with stock_context(path, **options) as context:
        for start in range(0, len(prompt), context.ubatch):
            context.decode(prompt[start : start + context.ubatch])
        while True:
            tokens.append(int(context.logits().argmax()))
            if len(tokens) == count:
                return tokens
            context.decode(tokens[-1:])


def build_shim(directory: Path) -> Path:
    """tests/faulty_read.c as a library for LD_PRELOAD."""
    library = directory / "faulty_read.so"
    source = Path(__file__).with_name("faulty_read.c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(source), "-ldl"], check=True, capture_output=True)
    return library


def shim_environment(library: Path, **settings: object) -> dict[str, str]:
    """An environment whose processes read through the shim. `settings`: see tests/faulty_read.c."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    values = {name: str(value) for name, value in settings.items()}
    python_path = os.pathsep.join(filter(None, paths))
    preload = " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)])  # a sanitizer's comes first
    return {**os.environ, "LD_PRELOAD": preload, "PYTHONPATH": python_path, **values}
