"""The files of one stage: its graph, and its weights in the forms that its kernels want them in.

ONNX Runtime writes both: weights that a kernel rearranges ("prepacks") for this processor are stored
rearranged as well, and are then used straight from the file. So a stage's session holds nothing of them
itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime as ort

from edgeinfer.onnx.homes import Mapping, as_made, mappings, without
from edgeinfer.onnx.runtime import make_session, session_options

INLINE_BYTES = 64 << 10  # weights below this stay in the graph's own file, and so in memory


@dataclass(frozen=True)
class Table:
    """A weight at `offset` of the data file whose rows are looked up by the integers of the stage's input
    `indices`.
    """

    offset: int
    nbytes: int
    row_bytes: int
    indices: str


@dataclass(frozen=True)
class StageFiles:
    """A prepared stage. `ranges`: (offset, bytes) of the data file that its session maps, whole pages.

    `idle`: the offsets of ranges that are most likely never read: their kernels have them in a rearranged
    weight. `tables`: weights of which only rows are read. `model_bytes`, `data_bytes`: the sizes of the
    files.
    """

    model: str
    data: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...] = ()
    idle: tuple[int, ...] = ()
    tables: tuple[Table, ...] = ()
    model_bytes: int = 0
    data_bytes: int = 0

    def as_json(self) -> dict:
        return asdict(self)

    def are_whole(self, folder: Path) -> bool:
        """Whether the files have their sizes."""
        sizes = [
            path.stat().st_size if path.exists() else 0 for path in (folder / self.model, folder / self.data)
        ]
        return sizes == [self.model_bytes, self.data_bytes]

    @classmethod
    def from_json(cls, values: dict) -> StageFiles:
        return cls(
            model=str(values["model"]),
            data=str(values["data"]),
            inputs=tuple(values["inputs"]),
            outputs=tuple(values["outputs"]),
            ranges=tuple((int(offset), int(nbytes)) for offset, nbytes in values["ranges"]),
            idle=tuple(int(offset) for offset in values["idle"]),
            tables=tuple(Table(**table) for table in values["tables"]),
            model_bytes=int(values["model_bytes"]),
            data_bytes=int(values["data_bytes"]),
        )


def write_stage(model: bytes, folder: Path, files: StageFiles, data_folder: Path, optimize: bool) -> None:
    """Let ONNX Runtime write `files` into `folder` from a stage's model, whose weights are in files of
    `data_folder`.

    `optimize`: the stage by itself, where the whole graph was not optimized before.
    """
    options = _stage_options(1)
    if optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = os.fspath(folder / files.model)
    settings = {
        "session.model_external_initializers_file_folder_path": os.fspath(data_folder),
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": files.data,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE_BYTES),
    }
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    make_session(model, options)


def open_stage(
    folder: Path, files: StageFiles, threads: int, ranges: Iterable[tuple[int, int]]
) -> tuple[ort.InferenceSession, list[Mapping]]:
    """The session of a stage, and where it has mapped its weights, which lie in `ranges` of the data file."""
    options = _stage_options(threads)
    options.add_session_config_entry("session.use_env_allocators", "1")
    data = folder / files.data
    before = mappings(data) if data.exists() else []  # of another model that is opened from the same files
    session = make_session(os.fspath(folder / files.model), options)
    found = mappings(data) if data.exists() else []
    return session, as_made(without(found, before), ranges)


def page_ranges(found: Iterable[Mapping]) -> tuple[tuple[int, int], ...]:
    return tuple((mapping.offset, mapping.nbytes) for mapping in found)


def _stage_options(threads: int) -> ort.SessionOptions:
    options = session_options(threads)
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # done, over the whole graph
    # Weights that are rearranged while a session is made pass through memory that goes back to the system.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False  # one block for a whole stage would not fit into what another has left
    # Each session has threads of its own: those of one must not spin while another computes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
