"""Makes models of any size with random weights, for measurements and tests only: they say nothing of sense.

    python -m benchmarks.maker OUT.gguf --arch llama --size 3.3GB --type Q4_0

The same arguments give the same bytes. A tensor's bytes depend on the seed and its name and shape only, so that
two models that differ in one dimension share the tensors that it does not touch.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from benchmarks.architecture import Architecture, Tensor, architecture_names, read_architecture
from benchmarks.routing import gate_rows
from benchmarks.sizes import fit
from benchmarks.vocabulary import BEGIN, END, NUM_SPECIAL, UNKNOWN, make_vocabulary
from benchmarks.weights import RandomStream, random_rows

TYPES = ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "F16", "F32")
ROUTINGS = ("spread", "skewed")
# Special tokens and bytes get small output rows, so that greedy text has no early end and is valid UTF-8
SPECIAL_GAIN = 1 / 16


@dataclass(frozen=True)
class MadeModel:
    path: Path
    nbytes: int
    dimensions: dict[str, int]


def make_model(
    path: str | os.PathLike,
    arch: str = "llama",
    type: str = "Q4_0",
    *,
    size: int | None = None,
    seed: int = 0,
    alignment: int = 32,
    routing: str = "spread",
    tied: bool | None = None,
    **dimensions: int,
) -> MadeModel:
    """Write a GGUF model of about `size` bytes (within 5 %) and random weights to `path`.

    `arch` names a file of architectures/. `dimensions` (layers, embedding, ffn, heads, kv_heads, head_size, vocabulary,
    context, experts, experts_used and what the architecture adds) are kept; the others are chosen to fit `size`.
    `type` is for the matrices; norms, biases and gates are F32. ValueError for what cannot be made. At most a few
    chunks of 8 MB are held; the file appears under its name only when it is whole.
    """
    if type not in TYPES:
        raise ValueError(f"expected a type out of {', '.join(TYPES)}, found '{type}'")
    if routing not in ROUTINGS:
        raise ValueError(f"expected a routing out of {', '.join(ROUTINGS)}, found '{routing}'")
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"expected an alignment that is a power of two from 8, found {alignment}")
    architecture = read_architecture(arch)
    resolved = fit(architecture, type, size, tied, dimensions)
    tensors = architecture.make_tensors(type, resolved, tied)
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        _write_header(name, architecture, type, tensors, resolved, alignment, seed)
        is_tied = not any(tensor.kind == "output" for tensor in tensors)
        with open(name, "ab") as file:
            for tensor in tensors:
                file.write(b"\0" * (-file.tell() % alignment))
                for chunk in _tensor_chunks(tensor, seed, routing, is_tied, architecture, resolved):
                    file.write(chunk)
            file.write(b"\0" * (-file.tell() % alignment))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return MadeModel(target, target.stat().st_size, resolved)


def _tensor_chunks(
    tensor: Tensor, seed: int, routing: str, tied: bool, architecture: Architecture, dimensions: dict[str, int]
) -> Iterator[np.ndarray]:
    stream = RandomStream(seed, tensor.name)
    length, rows = tensor.shape[0], tensor.num_rows
    if tensor.kind == "norm":
        yield (1 + 0.1 * stream.normal(length)).astype(np.float32)
    elif tensor.kind == "bias":
        yield 0.1 * tensor.gain * stream.normal(length * rows)
    elif tensor.kind == "gate":
        yield gate_rows(stream, length, rows, dimensions["experts_used"], routing)
    else:
        std = tensor.gain / length**0.5
        if tensor.kind == "expert_output":  # their average is as large as a dense layer's output
            std *= dimensions["experts_used"] ** 0.5
        if tensor.kind == "embedding" and not tied and not architecture.tied:
            std = 1.0
        special = NUM_SPECIAL if tensor.kind == "output" or tensor.kind == "embedding" and tied else 0
        yield from random_rows(stream, tensor.type, length, special, std * SPECIAL_GAIN)
        yield from random_rows(stream, tensor.type, length, rows - special, std)


def _write_header(
    path: str, architecture: Architecture, type: str, tensors: list[Tensor], dimensions: dict[str, int],
    alignment: int, seed: int,
) -> None:
    """Magic, metadata and tensor list; the data goes behind it."""
    writer = gguf.GGUFWriter(None, architecture.architecture)
    writer.add_name(f"made {architecture.name} {type}, seed {seed}")
    writer.add_file_type(gguf.LlamaFileType[{"F16": "MOSTLY_F16", "F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M"}.get(
        type, f"MOSTLY_{type}")])
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, value in architecture.metadata_values(dimensions).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    vocabulary = make_vocabulary(dimensions["vocabulary"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    for tensor in tensors:
        # the shape of the elements, slowest first, as the package wants it
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes,
                               gguf.GGMLQuantizationType[tensor.type])
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _parse_size(text: str) -> int:
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]I?)?B?\s*", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 3.3GB or 600MiB, found '{text}'")
    return int(float(match[1]) * units[match[2] or ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maker", description="Make a model of random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="llama", help="one of " + ", ".join(architecture_names()))
    parser.add_argument("--type", default="Q4_0", choices=TYPES)
    parser.add_argument("--size", type=_parse_size, help="such as 3.3GB; what is not given below is chosen to fit it")
    for name in ("layers", "embedding", "ffn", "heads", "kv-heads", "head-size", "context", "experts", "experts-used"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--vocab", dest="vocabulary", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--tied", action="store_true", default=None, help="the output matrix is the token embedding")
    parser.add_argument("--routing", default="spread", choices=ROUTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alignment", type=int, default=32)
    options = vars(parser.parse_args(arguments))
    started = time.monotonic()
    try:
        made = make_model(options.pop("out"), **options)
    except ValueError as error:
        parser.exit(2, f"maker: {error}\n")
    shape = ", ".join(f"{name} {value}" for name, value in made.dimensions.items() if value)
    print(f"{made.path}: {made.nbytes:,} bytes in {time.monotonic() - started:.1f} s ({shape})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
