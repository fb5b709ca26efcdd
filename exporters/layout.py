"""A GGUF file laid out for streaming: pages, the order of use, and each expert's gate and up side by side.

GGUF keeps every tensor in one piece, so one expert's matrices can lie together only where one tensor holds
them: llama.cpp reads `blk.N.ffn_gate_up_exps.weight`, for each expert the rows of gate and then those of up,
for some architectures. No weight is changed, only moved.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeinfer.budget import default_budget, format_size, process_memory
from edgeinfer.errors import BudgetError, ExportError
from edgeinfer.exporters.order import order_of_use
from edgeinfer.exporters.output import Target
from edgeinfer.exporters.rewrite import NUM_BUFFERS, Placed, rewrite, rewritten_bytes
from edgeinfer.modelfile import ModelFile, TensorInfo, read_model_file

ALIGNMENT = 4096
#: Architectures that run with merged experts: those whose tensors llama.cpp makes by
#: create_tensor_gate_up_exps (or, gemma4, in the same way) and whose graph uses them. llama.cpp of
#: llama-cpp-python 0.3.36, src/models/.
MERGES_EXPERTS = frozenset(
    ("cohere2moe", "deepseek2", "deepseek2-ocr", "gemma4", "granite_swa", "hy_v3", "mistral4")
    + ("qwen35moe", "qwen3next", "qwen4exp")
)
_BUFFER_BYTES = 4 << 20
_SMALLEST_BUFFER_BYTES = 64 << 10
_NOT_SEEN = "the order of use could not be seen, as llama.cpp cannot open the model, or not within --memory"
_RESERVE_BYTES = 16 << 20  # the header, Python objects, threads


@dataclass(frozen=True)
class LayoutReport:
    """What was written. `order_from_graph`: else by the tensors' names. `merged_layers`: whose gate and up
    are one tensor.
    """

    path: Path
    file_bytes: int
    tensors: int
    alignment: int
    order_from_graph: bool
    merged_layers: int
    seconds: float

    def lines(self) -> list[str]:
        """For the screen."""
        order = "use" if self.order_from_graph else f"names: {_NOT_SEEN}"
        size = format_size(self.file_bytes)
        lines = [
            f"{self.path}: {size}, written in {self.seconds:.1f} s",
            f"{self.tensors} tensors at multiples of {self.alignment} bytes, in the order of their {order}",
        ]
        if self.merged_layers:
            lines.append(f"gate and up of each expert side by side in {self.merged_layers} layers")
        return lines

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "path": str(self.path)}


def lay_out(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    memory: int | None = None,
    merge: bool = True,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LayoutReport:
    """Write the GGUF model `source` (all parts of a split one) to the one file `target`.

    `memory`: bytes that the process may hold (None: default_budget). `merge`: False keeps gate and up of
    experts apart, for programs that know them only so. `force`: replace what is there. Raises ModelFileError,
    ExportError, BudgetError.
    """
    started = time.perf_counter()
    file = read_model_file(source)
    output = Target(target, force)
    buffer_bytes, room = _share(default_budget() if memory is None else memory)
    names, from_graph = order_of_use(file, room)
    tensors = arrange(file, names, merge)
    alignment = max(ALIGNMENT, file.alignment)
    _check_room(output.path, rewritten_bytes(file, tensors, alignment))
    with output as part:
        size = rewrite(file, tensors, part, alignment=alignment, buffer_bytes=buffer_bytes, progress=progress)
    merged = sum(len(tensor.sources) > 1 for tensor in tensors)
    return LayoutReport(
        output.path, size, len(tensors), alignment, from_graph, merged, time.perf_counter() - started
    )


def arrange(file: ModelFile, names: list[str], merge: bool = True) -> list[Placed]:
    """The tensors of the new file in the order of `names`; a merged one takes the place of the first of its
    two.
    """
    infos = {tensor.name: tensor for tensor in file.tensors}
    pairs = {}
    if merge and file.architecture in MERGES_EXPERTS:
        for info in file.tensors:
            if info.role == "ffn_gate_exps" and (pair := _mergeable(info, infos)):
                pairs.update(dict.fromkeys((tensor.name for tensor in pair), pair))
    placed: dict[str, Placed] = {}
    for name in names:
        new = _merged(pairs[name]) if name in pairs else _moved(infos[name])
        placed.setdefault(new.name, new)
    return list(placed.values())


def _mergeable(gate: TensorInfo, infos: dict[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """(gate, up) of a layer, where they are alike. Biases and scales of one of them have no merged form."""
    up = infos.get(f"blk.{gate.layer}.ffn_up_exps.weight")
    if up is None or not gate.name.endswith(".weight") or not gate.num_experts:
        return None
    prefixes = tuple(f"blk.{gate.layer}.ffn_{kind}_exps." for kind in ("gate", "up", "gate_up"))
    alone = sum(name.startswith(prefixes) for name in infos) == 2
    return (gate, up) if alone and (gate.type, gate.shape) == (up.type, up.shape) else None


def _merged(pair: tuple[TensorInfo, TensorInfo]) -> Placed:
    gate, _ = pair
    width, rows, experts = gate.shape
    name = f"blk.{gate.layer}.ffn_gate_up_exps.weight"
    return Placed(name, gate.type, (width, 2 * rows, experts), pair, slices=experts)


def _moved(info: TensorInfo) -> Placed:
    return Placed(info.name, info.type, info.shape, (info,))


def _share(memory: int) -> tuple[int, int]:
    """(bytes of a buffer, bytes left for another process) within `memory`."""
    left = memory - process_memory().rss_bytes - _RESERVE_BYTES
    buffer_bytes = min(_BUFFER_BYTES, left // NUM_BUFFERS) // ALIGNMENT * ALIGNMENT
    if buffer_bytes < _SMALLEST_BUFFER_BYTES:
        smallest = memory - left + NUM_BUFFERS * _SMALLEST_BUFFER_BYTES + (1 << 20)
        raise BudgetError(
            f"--memory of {format_size(memory)} is too small for moving a model's tensors: the smallest that "
            f"works is {format_size(smallest)} ({smallest} bytes).",
            smallest_bytes=smallest,
        )
    return buffer_bytes, left


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ExportError(
            f"{path} would take {format_size(needed)}, but the disk has {format_size(free)} free. Free some "
            "space, or choose another -o."
        )
