"""What an export to ONNX takes of memory, known before it begins."""

from __future__ import annotations

from pathlib import Path

from edgeinfer.budget import format_size
from edgeinfer.errors import BudgetError
from edgeinfer.exporters.checkpoint import read_checkpoint
from edgeinfer.exporters.onnx_export import STATIC_FORMS, find_quant
from edgeinfer.exporters.parallel import THREADS
from edgeinfer.onnx.graph import read_onnx

_MIB = 1 << 20
# Measured: an export of a tiny model, and what PyTorch and transformers add to it
_BASE_BYTES, _TORCH_BYTES = 130 * _MIB, 240 * _MIB
_BUFFERS = 48 * _MIB  # of a thread
_OF_A_WEIGHT, _OF_AN_INT8_WEIGHT, _OF_A_MODEL = 1, 2, 4  # times its bytes in float32


def needed_bytes(source: Path, quant: str | None) -> int:
    """About the bytes that exporting `source` (an ONNX file or a checkpoint folder) takes, without --check;
    pages of mapped files, which the system takes back when it needs them, are not counted.
    """
    from edgeinfer.exporters.onnx_decoder import is_decoder

    kind = find_quant(quant) if quant is not None else None
    base = _BASE_BYTES + THREADS * _BUFFERS
    if source.is_dir():
        checkpoint = read_checkpoint(source)
        whole = not is_decoder(checkpoint.config)
        rows = checkpoint.config.get("vocab_size")  # embedding and output matrix are written in pieces
        tensors = [found for found in checkpoint.tensors.values() if whole or found.shape[0] != rows]
        sizes = [4 * record.num_elements for record in tensors]
        base += _TORCH_BYTES
    else:
        sizes = [tensor.nbytes for tensor in read_onnx(source).tensors]
        whole = kind in STATIC_FORMS
    if whole:
        return base + _OF_A_MODEL * sum(sizes)
    factor = _OF_AN_INT8_WEIGHT if kind == "INT8" and source.is_file() else _OF_A_WEIGHT
    largest = sorted(sizes)[-THREADS:]
    return base + factor * sum(largest)


def require_memory(source: Path, quant: str | None, memory: int) -> None:
    """BudgetError where the export takes more than `memory` bytes."""
    needed = needed_bytes(source, quant)
    if needed > memory:
        raise BudgetError(
            f"Exporting {source} to ONNX takes up to {format_size(needed)}: more than --memory allows, "
            f"{format_size(memory)}. Raise --memory.",
            smallest_bytes=needed,
        )
