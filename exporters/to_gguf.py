"""From a checkpoint folder to a GGUF file: F32, F16 or BF16, tensors at pages, in order of use."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.aligned_file import PAGE
from edgeinfer.exporters.checkpoint import Checkpoint, read_checkpoint
from edgeinfer.exporters.hyperparameters import complete_config, gguf_metadata, window_notes
from edgeinfer.exporters.mapping import ArchitectureMapping, find_mapping
from edgeinfer.exporters.rope import read_rope
from edgeinfer.exporters.tensor_plan import EMBEDDING, TensorPlan, plan_tensors
from edgeinfer.exporters.tensor_writer import Placed, write_tensors

if TYPE_CHECKING:
    import gguf

#: The types that need no quantization.
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GGUFReport:
    """What was exported. `notes`: what differs from the original, and when."""

    architecture: str
    type: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]


def export_gguf(
    source: str | Path,
    target: Path,
    type: str | None = None,
    *,
    name: str | None = None,
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> GGUFReport:
    """Write the checkpoint folder `source` as GGUF to `target` (use output.Target: it may be left
    half-written).

    `type`: one of FLOAT_TYPES, None for the checkpoint's own; vectors and gates of experts are F32 always.
    `name`: general.name, the folder's name where it is None. `memory`: bytes that this process may hold;
    without it, some 100 MB and the vocabulary are added to what it holds.
    Raises ExportError (unknown architecture, tensors that do not fit), ModelFileError, BudgetError.
    """
    started = time.monotonic()
    _require_gguf()
    from edgeinfer.exporters.vocabulary import read_vocabulary

    if type not in (None, *FLOAT_TYPES):
        raise ExportError(f"The type {type!r} is not a float type: expected {', '.join(FLOAT_TYPES)}.")
    checkpoint = read_checkpoint(source)
    mapping = find_mapping(checkpoint.config)
    values = complete_config(mapping, checkpoint.config)
    rope = read_rope(values, mapping.rope)
    plan = plan_tensors(mapping, checkpoint, values, rope.tensors)
    type = type or _own_type(plan)
    vocabulary = read_vocabulary(checkpoint.folder, values)
    _check_rows(checkpoint, plan, vocabulary.size)
    metadata = {
        **_general(vocabulary.name_for(name or _folder_name(checkpoint.folder)), type, plan),
        **gguf_metadata(mapping, values, rope),
        **vocabulary.metadata,
    }
    placed = _write_header(target, mapping.gguf, metadata, plan, type)
    write_tensors(target, placed, memory, progress)
    return GGUFReport(
        architecture=mapping.gguf,
        type=type,
        tensors=len(placed),
        parameters=sum(tensor.num_elements for tensor in plan.tensors),
        bytes=target.stat().st_size,
        seconds=time.monotonic() - started,
        notes=(*_notes(mapping, values, plan), *rope.notes, *vocabulary.warnings),
    )


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ExportError(
            'Exporting to GGUF needs the gguf package: pip install "edgeinfer[export]"'
        ) from None


def _folder_name(folder: Path) -> str:
    """The folder's name; in a download cache (models--OWNER--NAME/snapshots/COMMIT) the model's."""
    folder = folder.resolve()
    cache = folder.parent.parent.name
    in_cache = folder.parent.name == "snapshots" and cache.startswith("models--")
    return cache.split("--")[-1] if in_cache else folder.name


def _own_type(plan: TensorPlan) -> str:
    """The dtype of most of the elements that are not float32 anyway."""
    elements: Counter[str] = Counter()
    for tensor in plan.tensors:
        for piece in () if tensor.keep_float else tensor.pieces:
            elements[piece.record.dtype] += piece.num_elements
    dtype = elements.most_common(1)[0][0]
    return "F32" if dtype == "F64" else dtype


def _check_rows(checkpoint: Checkpoint, plan: TensorPlan, tokens: int) -> None:
    """llama.cpp wants a token for each row of the embedding."""
    rows = next(tensor.shape[0] for tensor in plan.tensors if tensor.name == EMBEDDING)
    if tokens != rows:
        raise ExportError(
            f"{checkpoint.folder}: the tokenizer has {tokens:,} tokens, the embedding {rows:,} rows. The "
            "tokenizer's files do not belong to these weights."
        )


def _general(name: str, type: str, plan: TensorPlan) -> dict[str, Any]:
    import gguf

    file_types = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    stacked = [tensor for tensor in plan.tensors if len(tensor.shape) == 3]
    expert = sum(prod(tensor.shape[1:]) for tensor in stacked)
    shared = sum(tensor.num_elements for tensor in plan.tensors if len(tensor.shape) < 3)
    experts = stacked[0].shape[0] if stacked else 0
    total = sum(tensor.num_elements for tensor in plan.tensors)
    return {
        gguf.Keys.General.TYPE: "model",
        gguf.Keys.General.NAME: name,
        gguf.Keys.General.SIZE_LABEL: gguf.size_label(total, shared, expert, experts),
        gguf.Keys.General.FILE_TYPE: int(file_types[type]),
        gguf.Keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
    }


def _write_header(
    target: Path, architecture: str, metadata: Mapping[str, Any], plan: TensorPlan, type: str
) -> list[Placed]:
    """Magic, metadata and tensor list; where each tensor's data goes."""
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_custom_alignment(PAGE)
    for key, value in metadata.items():
        _add(writer, key, value)
    placed, place = [], 0
    for tensor in plan.tensors:
        kind = "F32" if tensor.keep_float else type
        placed.append(Placed(tensor, kind, place))
        num_bytes = placed[-1].num_bytes
        # float32 says that the shape counts elements
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, gguf.GGMLQuantizationType[kind]
        )
        place += -(-num_bytes // PAGE) * PAGE
    try:
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    start = -(-target.stat().st_size // PAGE) * PAGE
    return [replace(item, offset=start + item.offset) for item in placed]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _notes(mapping: ArchitectureMapping, values: Mapping[str, Any], plan: TensorPlan) -> list[str]:
    notes = window_notes(mapping, values)
    if plan.untied:
        notes.append(
            "config.json ties the output matrix to the token embedding, but the checkpoint holds another "
            "one, which is used, as transformers 5 does"
        )
    if plan.dropped == 1:
        notes.append("1 tensor that does not belong to the language model is left out")
    elif plan.dropped:
        notes.append(f"{plan.dropped:,} tensors that do not belong to the language model are left out")
    return notes
