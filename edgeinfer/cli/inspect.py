"""`edgeinfer inspect`: what is in a GGUF or ONNX file, without reading its weights."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import click

from edgeinfer.budget import format_size
from edgeinfer.errors import EdgeInferError
from edgeinfer.kind import model_kind
from edgeinfer.modelfile import GGUFArray, ModelFile, TensorInfo, read_model_file

NUM_LARGEST = 5


@click.command()
@click.argument("model", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every tensor and key.")
def inspect(model: str, as_json: bool) -> None:
    """Show what is in a GGUF or ONNX model file. A split model is given by its first part.

    \b
    Examples:
      edgeinfer inspect model.gguf
      edgeinfer inspect model.onnx
      edgeinfer inspect model-00001-of-00003.gguf --json
    """
    try:
        facts, show = _facts(model)
    except EdgeInferError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(facts, allow_nan=False) if as_json else show(facts))


def _facts(model: str) -> tuple[dict, Callable[[dict], str]]:
    """The facts, and what shows them to people."""
    if model_kind(model) == "gguf":
        return describe(read_model_file(model)), table
    from edgeinfer.cli.inspect_onnx import describe_onnx, table_onnx
    from edgeinfer.onnx.graph import read_onnx

    return describe_onnx(read_onnx(model)), table_onnx


def describe(model: ModelFile) -> dict:
    """The facts that `--json` prints; every value is plain JSON."""
    return {
        "architecture": model.architecture,
        "name": model.name,
        "num_parameters": model.num_parameters,
        "num_layers": model.num_layers,
        "context_length": model.context_length,
        "embedding_length": model.embedding_length,
        "vocab_size": model.vocab_size,
        "num_experts": model.num_experts,
        "num_experts_used": model.num_experts_used,
        "is_causal": model.is_causal,
        "is_vocabulary_only": model.is_vocabulary_only,
        "gguf_version": model.version,
        "alignment": model.alignment,
        "file_bytes": model.file_bytes,
        "weights_bytes": model.weights_bytes,
        "parts": [
            {"path": str(path), "bytes": size}
            for path, size in zip(model.paths, model.part_bytes, strict=True)
        ],
        "bytes_by_type": _sizes((tensor.type, tensor.nbytes) for tensor in model.tensors),
        "bytes_by_group": _sizes((role_group(tensor), tensor.nbytes) for tensor in model.tensors),
        "tensors": [asdict(tensor) for tensor in model.tensors],
        "metadata": {key: _plain(value) for key, value in model.metadata.items()},
    }


def role_group(tensor: TensorInfo) -> str:
    """What a tensor is for, coarsely: "attention", "experts", "norms"... from llama.cpp's tensor names."""
    role = tensor.role
    if tensor.num_experts:
        return "experts"
    if "norm" in role:
        return "norms"
    if "token_embd" in role:
        return "embedding"
    if tensor.layer is None:
        return "output" if role.startswith("output") else "other"
    if role.startswith("ffn_gate_inp"):
        return "router"
    prefixes = {"attn": "attention", "ffn": "feed-forward", "ssm": "recurrent", "time_mix": "recurrent"}
    return next((group for prefix, group in prefixes.items() if role.startswith(prefix)), "other")


def table(facts: dict) -> str:
    """The facts for people, about 25 lines. Text from the file is escaped: it may hold terminal commands."""
    experts = (
        f"{facts['num_experts']}, {facts['num_experts_used']} used a token"
        if facts["num_experts"]
        else "none"
    )
    parts = facts["parts"]
    lines = _rows(
        ("file", _printable(parts[0]["path"])),
        ("size", f"{format_size(facts['file_bytes'])} in {len(parts)} part{'s' if len(parts) > 1 else ''}"),
        ("format", f"GGUF v{facts['gguf_version']}, alignment {facts['alignment']}"),
        ("name", _printable(facts["name"])),
        (
            "architecture",
            _printable(facts["architecture"]) + ("" if facts["is_causal"] else " (cannot generate text)"),
        ),
        ("parameters", _count(facts["num_parameters"])),
        ("layers", _count(facts["num_layers"])),
        ("context", _count(facts["context_length"], "tokens")),
        ("vocabulary", _count(facts["vocab_size"], "tokens")),
        ("experts", experts),
    )
    if len(parts) > 1:
        lines += ["", "parts", *_rows(*((format_size(p["bytes"]), _printable(p["path"])) for p in parts))]
    if facts["is_vocabulary_only"]:
        return "\n".join([*lines, "", "This file has a vocabulary only, no weights."])
    for title in ("type", "group"):
        lines += ["", f"bytes by {title}", *_shares(facts[f"bytes_by_{title}"], facts["weights_bytes"])]
    largest = sorted(facts["tensors"], key=lambda tensor: -tensor["nbytes"])[:NUM_LARGEST]
    lines += ["", f"largest of {len(facts['tensors'])} tensors"]
    for tensor in largest:
        name, shape = _printable(tensor["name"]), " x ".join(map(str, tensor["shape"]))
        lines.append(f"  {format_size(tensor['nbytes']):>10}  {tensor['type']:<8}{name} ({shape})")
    return "\n".join(lines)


def _sizes(pairs) -> dict[str, int]:
    """{name: bytes}, the largest first."""
    sums: Counter[str] = Counter()
    for name, nbytes in pairs:
        sums[name] += nbytes
    return dict(sums.most_common())


def _rows(*pairs: tuple[str, str]) -> list[str]:
    return [f"  {label:<14}{value}" for label, value in pairs]


def _shares(sizes: dict[str, int], total: int) -> list[str]:
    return _rows(*((name, f"{format_size(size):>10} {size / total:6.1%}") for name, size in sizes.items()))


def _count(number: int | None, unit: str = "") -> str:
    return "not stated" if number is None else f"{number:,} {unit}".rstrip()


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _plain(value):
    """JSON has neither NaN nor infinity: they become strings."""
    if isinstance(value, GGUFArray):
        values = None if value.values is None else [_plain(item) for item in value.values]
        return {"element_type": value.element_type, "length": value.length, "values": values}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
