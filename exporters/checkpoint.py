"""A Hugging Face style checkpoint folder: config.json and safetensors, one file or shards with an index."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ExportError, ModelFileError
from edgeinfer.exporters.safetensors_file import TensorRecord, read_records

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON = 256 << 20
_WHY_NOT = (
    "is a pickle: loading one can run any program that its maker put in, so edgeinfer does not. Save the "
    "model as safetensors: `save_pretrained(folder)` of transformers does."
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds; the tensors' data stays on disk."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRecord]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the config and the headers of all shards.

    Raises ExportError for what is no checkpoint folder or holds pickles, ModelFileError for damaged files.
    """
    folder = Path(folder)
    if folder.suffix in _PICKLES and folder.is_file():
        raise ExportError(f"{folder} {_WHY_NOT}")
    if not folder.is_dir():
        found = "a file is there" if folder.exists() else "it does not exist"
        raise ExportError(
            f"{folder}: expected a checkpoint folder with config.json and {SINGLE}, but {found}."
        )
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ExportError(f"{folder}: no permission to look into this folder. Change that, or copy it.")
    config = read_config(folder)
    return Checkpoint(folder, config, _read_tensors(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    path = folder / "config.json"
    if not path.is_file():
        raise ExportError(
            f"{folder}: there is no config.json. Expected a checkpoint folder as transformers' "
            "save_pretrained makes it."
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: has more than {_MAX_JSON:,} bytes, which no such file needs.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is not JSON ({error}). The file is damaged: get it again.") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _read_tensors(folder: Path) -> dict[str, TensorRecord]:
    """As transformers: the single file wins over shards."""
    if (folder / SINGLE).is_file():
        return read_records(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ExportError(f"{folder / pickles[0]} {_WHY_NOT}")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"found {', '.join(others[:3])}" if others else "found no weights"
    raise ExportError(f"{folder}: expected {SINGLE} or {INDEX}, {found}.")


def _read_shards(folder: Path) -> dict[str, TensorRecord]:
    place = _weight_map(folder / INDEX)
    shards = {}
    for name in sorted(set(place.values())):
        if not (folder / name).is_file():
            raise ModelFileError(
                f"{folder / INDEX}: names the shard {name}, which is missing. Download it too."
            )
        shards[name] = read_records(folder / name)
    absent = [name for name, shard in place.items() if name not in shards[shard]]
    if absent:
        raise ModelFileError(
            f"{folder / INDEX}: says that {place[absent[0]]} holds {absent[0]!r}, but it does not"
            f"{_more(absent)}. The files do not belong together: download them again."
        )
    return _joined(folder, shards, place)


def _joined(
    folder: Path, shards: dict[str, dict[str, TensorRecord]], place: dict[str, str]
) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for shard, records in shards.items():
        for name, record in records.items():
            if place.get(name, shard) != shard:
                continue  # the index names another shard for it
            if name in tensors:
                raise ModelFileError(
                    f"{folder}: tensor {name!r} is in {tensors[name].path.name} and in {shard}, and {INDEX} "
                    "does not say which counts. Download the folder again."
                )
            tensors[name] = record
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, a file in the same folder."""
    place = _read_json(path).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise ModelFileError(f"{path}: has no 'weight_map' of tensors. Download it again.")
    for tensor, shard in place.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise ModelFileError(
                f"{path}: places tensor {tensor!r} in {str(shard)[:80]!r}, expected the name of a file in "
                "this folder."
            )
        if not shard.endswith(".safetensors"):
            raise ModelFileError(f"{path}: names the shard {shard!r}, expected *.safetensors.")
    return place


def _is_file_name(text: str) -> bool:
    return Path(text).name == text and text not in ("", ".", "..") and "\0" not in text and len(text) <= 255


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
