"""Sizes ("2GiB", "50%"), the memory that is available now, and the ledger that accounts for every byte.

Available is what Linux can give without swapping: MemAvailable, or less where a cgroup limits this process.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

from edgeinfer.errors import BudgetError

_PROC = Path("/proc")
_MIN_RESERVE = 512 << 20
_MAX_SIZE = 1 << 62

#: K, M, G, T and KiB... count in 1024s, as memory does; KB... in 1000s, as disk makers do.
_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-z]*|%)", re.ASCII)
_ACCEPTED = (
    "Expected a size such as 2GiB, 1500M or 2.5GB, a number of bytes, or a share of what is available: 50%."
)


def parse_size(text: str) -> int:
    """Bytes that `text` means: "2GiB", "1500M" (MiB), "2.5GB", "1000000", or "50%" of `available_memory()`.

    K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB powers of 1000. Spaces and case do
    not matter. Raises BudgetError for anything else, also for zero and for less than one byte.
    """
    shown = repr(text[:40]) if isinstance(text, str) else repr(text)
    match = _SIZE.fullmatch(str(text).strip().lower())
    if not match or len(match[1]) > 40:
        raise BudgetError(f"The size {shown} cannot be read. {_ACCEPTED}")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise BudgetError(f"The share {shown} is not above 0% and at most 100%. {_ACCEPTED}")
        return max(1, int(available_memory() * number / 100))
    if unit not in _UNITS:
        raise BudgetError(f"The unit {match[2][:20]!r} of the size {shown} is unknown. {_ACCEPTED}")
    # A whole number stays exact; a float would lose the last bytes of a large one.
    size = int(match[1]) * _UNITS[unit] if match[1].isdigit() else int(number * _UNITS[unit])
    if not 1 <= size <= _MAX_SIZE:
        raise BudgetError(f"The size {shown} is {'too large' if size else 'zero'}. {_ACCEPTED}")
    return size


def format_size(num_bytes: int) -> str:
    """A size for people: "512 B", "1.46 GiB", "18.0 MiB", three digits."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{num_bytes} B"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def default_budget() -> int:
    """The budget where the user names none: what is available now less a reserve for the rest of the machine.

    The reserve is 512 MiB or a tenth, whichever is more: the page cache and other programs need room, and
    estimates are never exact. On a small machine it is half at most, so that a budget is left.
    """
    available = available_memory()
    reserve = max(_MIN_RESERVE, available // 10)
    return max(1, available - min(reserve, available // 2))


def budget_of(memory: int | str | None) -> int:
    """The budget that was asked for: bytes, "2GiB" or "50%", or None for `default_budget`. Raises BudgetError."""
    if memory is None:
        return default_budget()
    return memory if isinstance(memory, int) else parse_size(memory)


def available_memory() -> int:
    """Bytes that this process can take now without swapping: the least of its machine's and cgroups' room."""
    return min([_machine_available(), *_cgroup_rooms()])


def _machine_available() -> int:
    kib = _fields(_PROC / "meminfo").get("MemAvailable")
    return kib * 1024 if kib is not None else psutil.virtual_memory().available


def _cgroup_rooms() -> Iterator[int]:
    """Room under the limit of each memory cgroup of this process and of its visible ancestors."""
    for version, root, directory in _memory_cgroups():
        while True:
            room = _room_v2(directory) if version == 2 else _room_v1(directory)
            if room is not None:
                yield room
            if directory == root or root not in directory.parents:
                break
            directory = directory.parent


def _memory_cgroups() -> Iterator[tuple[int, Path, Path]]:
    """(cgroup version, mount point, this process's directory) for each hierarchy that may limit memory."""
    mounts = dict(_cgroup_mounts())
    for line in _lines(_PROC / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 2 if controllers == "" else 1 if "memory" in controllers.split(",") else 0
        if version in mounts:
            root, mount_point = mounts[version]
            # In a container the mount may show only a part of the tree: `root` is where that part begins.
            below = os.path.relpath(path, root) if (path + "/").startswith(root.rstrip("/") + "/") else "."
            yield version, mount_point, (mount_point / below) if below != "." else mount_point


def _cgroup_mounts() -> Iterator[tuple[int, tuple[str, Path]]]:
    for line in _lines(_PROC / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        places, kind = before.split(" "), after.split(" ")
        if kind[0] == "cgroup2":
            version = 2
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            version = 1
        else:
            continue
        yield version, (_unescape(places[3]), Path(_unescape(places[4])))


def _unescape(text: str) -> str:
    """mountinfo writes a space as \\040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _room_v2(directory: Path) -> int | None:
    """memory.high slows a process down to a crawl, so it counts as a limit too."""
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    return _room(limits, _number(directory / "memory.current"), directory, "inactive_file")


def _room_v1(directory: Path) -> int | None:
    limits = [_number(directory / "memory.limit_in_bytes")]
    return _room(limits, _number(directory / "memory.usage_in_bytes"), directory, "total_inactive_file")


def _room(limits: list[int | None], used: int | None, directory: Path, cache_field: str) -> int | None:
    """Limit less use; page cache that was not touched lately does not count: the kernel drops it first."""
    stated = [limit for limit in limits if limit is not None]
    if not stated or used is None:
        return None
    cache = _fields(directory / "memory.stat").get(cache_field, 0)
    return max(0, min(stated) - max(0, used - cache))


def _number(path: Path) -> int | None:
    """The number in a one-line file; None for "max" and where there is no such file."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """{name: number} of a file with lines such as "VmRSS:   1234 kB" or "inactive_file 4096"."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of this process that is in RAM, now and at its peak (bytes; file-backed pages count too).

    `file_bytes`: the file-backed part of what is held now, which the system takes away when memory is short; 0
    where it is not told.
    """

    rss_bytes: int
    peak_rss_bytes: int
    file_bytes: int = 0


def process_memory() -> ProcessMemory:
    """From VmRSS and VmHWM of /proc/self/status; from psutil where there is no /proc."""
    status = _fields(_PROC / "self/status")
    if "VmRSS" in status and "VmHWM" in status:
        peak = max(status["VmRSS"], status["VmHWM"])
        return ProcessMemory(status["VmRSS"] * 1024, peak * 1024, status.get("RssFile", 0) * 1024)
    info = psutil.Process().memory_info()
    return ProcessMemory(info.rss, max(info.rss, getattr(info, "peak_wset", 0)))


def reset_peak() -> bool:
    """Make the peak of `process_memory` start again from what is held now. False where the system cannot."""
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


#: What a ledger may list -> what it is, for the table.
LEDGER_ENTRIES: dict[str, str] = {
    "interpreter": "Python and libraries",
    "metadata": "vocabulary and metadata",
    "sessions": "sessions of the stages",
    "resident_weights": "weights kept in memory",
    "row_buffer": "rows of the embedding",
    "ring": "ring for streamed weights",
    "expert_cache": "cache of experts",
    "kv_cache": "KV cache",
    "compute_buffers": "compute and work buffers",
    "activations": "activations",
    "logits": "logits and outputs",
    "load_peak": "extra while loading",
}


@dataclass(frozen=True)
class Ledger:
    """Who holds how many bytes. BudgetError for a name not in LEDGER_ENTRIES or a negative amount."""

    entries: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, num_bytes in self.entries.items():
            if name not in LEDGER_ENTRIES:
                raise BudgetError(
                    f"The ledger has no entry {name!r}. Expected one of {', '.join(LEDGER_ENTRIES)}."
                )
            if type(num_bytes) is not int or num_bytes < 0:
                raise BudgetError(
                    f"The ledger's entry {name!r} must be a number of bytes, found {num_bytes!r}."
                )
        object.__setattr__(self, "entries", MappingProxyType(dict(self.entries)))

    @property
    def total(self) -> int:
        return sum(self.entries.values())

    def table(self) -> str:
        """One line an entry, in the order of LEDGER_ENTRIES, and the total."""
        rows = [(LEDGER_ENTRIES[name], self.entries[name]) for name in LEDGER_ENTRIES if name in self.entries]
        return "\n".join(
            f"{label:<28}{format_size(size):>10}" for label, size in [*rows, ("total", self.total)]
        )
