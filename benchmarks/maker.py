"""Makes models of any size with random weights, for measurements and tests only: they say nothing of sense.

    python -m benchmarks.maker OUT.gguf --arch llama --size 3.3GB --type Q4_0

The same arguments give the same bytes. A tensor's bytes depend on the seed and its name and shape only.
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

from benchmarks.architecture import (
    Architecture,
    Tensor,
    architecture_names,
    read_architecture,
)
from benchmarks.routing import ROUTINGS, gate_rows, norm_weights, residual_gain
from benchmarks.sizes import fit
from benchmarks.vocabulary import BEGIN, END, NUM_SPECIAL, UNKNOWN, make_vocabulary
from benchmarks.weights import RandomStream, random_rows

FILE_TYPES = {  # what general.file_type says
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "Q6_K": gguf.LlamaFileType.MOSTLY_Q6_K,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "F32": gguf.LlamaFileType.ALL_F32,
}
# Special tokens and bytes get small output rows: greedy text has no early end and is valid UTF-8
SPECIAL_GAIN = 1 / 16


@dataclass(frozen=True)
class Recipe:
    """All that a made model follows from. `dimensions` are complete."""

    architecture: Architecture
    type: str
    dimensions: dict[str, int]
    tensors: tuple[Tensor, ...]
    seed: int
    alignment: int
    routing: str

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return not any(tensor.kind == "output" for tensor in self.tensors)


def plan_model(
    arch: str = "llama",
    type: str = "Q4_0",
    *,
    size: int | None = None,
    seed: int = 0,
    alignment: int = 32,
    routing: str = "spread",
    tied: bool | None = None,
    **dimensions: int,
) -> Recipe:
    """The recipe of a model of about `size` bytes (within 5 %). ValueError for what cannot be made.

    `arch` names a file of architectures/. `type` is for the matrices; norms, biases and gates are F32.
    `dimensions` (layers, embedding, ffn, heads, kv_heads, head_size, vocabulary, context, experts,
    experts_used and what the architecture's defaults name) are kept; the others are chosen to fit `size`.
    """
    if type not in FILE_TYPES:
        raise ValueError(f"expected a type out of {', '.join(FILE_TYPES)}, found '{type}'")
    if routing not in ROUTINGS:
        raise ValueError(f"expected a routing out of {', '.join(ROUTINGS)}, found '{routing}'")
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"expected an alignment that is a power of two from 8, found {alignment}")
    architecture = read_architecture(arch)
    resolved = fit(architecture, type, size, tied, dimensions)
    tensors = tuple(architecture.make_tensors(type, resolved, tied))
    return Recipe(architecture, type, resolved, tensors, seed, alignment, routing)


def write_model(path: str | os.PathLike, recipe: Recipe) -> Path:
    """Write the model to `path`, which appears only when it is whole. Holds a few chunks of 8 MB."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        _write_header(name, recipe)
        with open(name, "ab") as file:
            for tensor in recipe.tensors:
                file.write(b"\0" * (-file.tell() % recipe.alignment))
                for chunk in _tensor_chunks(tensor, recipe):
                    file.write(chunk)
            file.write(b"\0" * (-file.tell() % recipe.alignment))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target


def make_model(path: str | os.PathLike, arch: str = "llama", type: str = "Q4_0", **options) -> Path:
    """`plan_model` and `write_model` in one; the options are those of `plan_model`."""
    return write_model(path, plan_model(arch, type, **options))


def _tensor_chunks(tensor: Tensor, recipe: Recipe) -> Iterator[np.ndarray]:
    stream = RandomStream(recipe.seed, tensor.name)
    length, rows = tensor.shape[0], tensor.num_rows
    used = recipe.dimensions["experts_used"]
    if tensor.kind == "norm":
        yield norm_weights(stream, tensor.name, length, recipe.routing)
    elif tensor.kind == "bias":
        yield np.float32(0.1 * tensor.gain) * stream.normal(length * rows)
    elif tensor.kind == "gate":
        yield gate_rows(stream, length, rows, used, recipe.routing)
    else:
        std = tensor.gain * residual_gain(tensor.name, recipe.routing) / length**0.5
        if tensor.kind == "expert_output":  # so that their average is as large as a dense layer's output
            std *= used**0.5
        if tensor.kind == "embedding" and not recipe.tied:
            std = tensor.gain
        is_output = tensor.kind == "output" or (tensor.kind == "embedding" and recipe.tied)
        special = NUM_SPECIAL if is_output else 0
        yield from random_rows(stream, tensor.type, length, special, std * SPECIAL_GAIN)
        yield from random_rows(stream, tensor.type, length, rows - special, std)


def _write_header(path: str, recipe: Recipe) -> None:
    """Magic, metadata and tensor list; the data goes behind it."""
    writer = gguf.GGUFWriter(None, recipe.architecture.architecture)
    # No architecture in the name: llama.cpp looks for "phi3" in it and then wants that model's tokens
    writer.add_name(f"random weights, {recipe.type}, seed {recipe.seed}")
    writer.add_file_type(FILE_TYPES[recipe.type])
    if recipe.alignment != 32:
        writer.add_custom_alignment(recipe.alignment)
    for key, value in recipe.architecture.metadata_values(recipe.dimensions).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    vocabulary = make_vocabulary(recipe.dimensions["vocabulary"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    for tensor in recipe.tensors:
        ggml_type = gguf.GGMLQuantizationType[tensor.type]
        # the package wants the slowest dimension first; float32 says that the shape counts elements
        writer.add_tensor_info(
            tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, raw_dtype=ggml_type
        )
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _size(text: str) -> int:
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]I?)?B?\s*", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 3.3GB or 600MiB, found '{text}'")
    return int(float(match[1]) * units[match[2] or ""])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maker", description="Make a random model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="llama", choices=architecture_names())
    parser.add_argument("--type", default="Q4_0", choices=FILE_TYPES)
    parser.add_argument("--size", type=_size, help="such as 3.3GB; dimensions that are not given fit it")
    for name in ("layers", "embedding", "ffn", "heads", "kv-heads", "head-size", "context"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--vocab", dest="vocabulary", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--experts", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--experts-used", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--routing", default="spread", choices=ROUTINGS)
    parser.add_argument("--tied", action="store_true", default=None, help="no output matrix of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alignment", type=int, default=32)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    started = time.monotonic()
    try:
        out = options.pop("out")
        recipe = plan_model(options.pop("arch"), options.pop("type"), **options)
        write_model(out, recipe)
    except (ValueError, OSError) as error:
        parser.exit(2, f"maker: {error}\n")
    shape = ", ".join(f"{name} {value}" for name, value in recipe.dimensions.items() if value)
    print(f"{out}: {out.stat().st_size:,} bytes in {time.monotonic() - started:.1f} s ({shape})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
