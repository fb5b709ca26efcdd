"""Sizes, the memory that is available under real and made cgroups, and the ledger."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgeinfer import budget
from edgeinfer.budget import Ledger, format_size, parse_size
from edgeinfer.errors import BudgetError

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2GiB", 2 * GIB),
        ("1500M", 1500 * MIB),
        ("2g", 2 * GIB),
        (" 2 gib ", 2 * GIB),
        ("1.5GB", 1_500_000_000),
        ("512 KB", 512_000),
        ("1T", 1 << 40),
        ("0.5TiB", 1 << 39),
        (".5K", 512),
        ("1000000", 1_000_000),
        ("1000000B", 1_000_000),
        ("1", 1),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: a float cannot hold it
    ],
)
def test_parse_size(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "The size '' cannot be read. Expected a size such as 2GiB, 1500M or 2.5GB"),
        ("-1GiB", "The size '-1GiB' cannot be read"),
        ("nan", "The size 'nan' cannot be read"),
        ("inf", "The size 'inf' cannot be read"),
        ("1e9", "The size '1e9' cannot be read"),
        ("2,5GB", "The size '2,5GB' cannot be read"),
        ("GiB", "The size 'GiB' cannot be read"),
        ("1 2", "The size '1 2' cannot be read"),
        ("½", "The size '½' cannot be read"),
        ("٣", "The size '٣' cannot be read"),
        ("9" * 5000, "cannot be read"),
        ("2XB", "The unit 'xb' of the size '2XB' is unknown. Expected a size"),
        ("0", "The size '0' is zero"),
        ("0.0GiB", "The size '0.0GiB' is zero"),
        ("0.1", "The size '0.1' is zero"),
        ("99999999TiB", "The size '99999999TiB' is too large"),
        ("0%", "The share '0%' is not above 0% and at most 100%"),
        ("101%", "The share '101%' is not above 0% and at most 100%"),
        (None, "The size None cannot be read"),
    ],
)
def test_parse_size_refuses(text, words):
    with pytest.raises(BudgetError, match=re.escape(words)):
        parse_size(text)


def test_parse_size_share(monkeypatch):
    monkeypatch.setattr(budget, "available_memory", lambda: 3 * GIB)
    assert parse_size("50%") == parse_size("50 %") == 3 * GIB // 2
    assert parse_size("12.5%") == 3 * GIB // 8


@pytest.mark.parametrize(
    "num_bytes, expected",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.00 KiB"),
        (18 * MIB, "18.0 MiB"),
        (999 * MIB, "999 MiB"),
        (1023 * MIB, "1.00 GiB"),
        (1_567_000_000, "1.46 GiB"),
        (3 << 40, "3.00 TiB"),
    ],
)
def test_format_size(num_bytes, expected):
    assert format_size(num_bytes) == expected


# Available memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made machine with 8 GiB available: machine(kind, {directory: {file: text}}, path of this process)."""
    proc, mount = tmp_path / "proc", tmp_path / "cg roup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(budget, "_PROC", proc)

    def build(kind: str, files: dict[str, dict[str, str]], path: str, root: str = "/") -> None:
        options = "rw,memory" if kind == "cgroup" else "rw"
        place = str(mount).replace(" ", r"\040")
        line = f"35 31 0:32 {root} {place} rw,relatime shared:9 - {kind} {kind} {options}\n"
        (proc / "self/mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda rw\n" + line)
        controllers = "4:memory" if kind == "cgroup" else "0:"
        (proc / "self/cgroup").write_text(f"7:cpu,cpuacct:/other\n{controllers}:{path}\n")
        for directory, contents in files.items():
            (mount / directory).mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (mount / directory / name).write_text(text)

    return build


def test_available_without_cgroups_is_mem_available(machine):
    assert budget.available_memory() == 8 * GIB


def test_available_without_proc_is_what_psutil_says(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_PROC", tmp_path)
    assert budget.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def v2(limit="max", used=0, cache=0, high="max"):
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\nfile {cache + 7}\ninactive_file {cache}\n",
    }


def test_cgroup_v2_limit_less_use_with_old_page_cache_given_back(machine):
    machine("cgroup2", {"user/app": v2(4 * GIB, used=3 * GIB, cache=GIB)}, "/user/app")
    assert budget.available_memory() == 2 * GIB


def test_cgroup_v2_limit_of_an_ancestor_counts(machine):
    machine("cgroup2", {"user/app": v2(6 * GIB), "user": v2(GIB, used=256 * MIB)}, "/user/app")
    assert budget.available_memory() == 768 * MIB


def test_cgroup_v2_high_counts(machine):
    machine("cgroup2", {"app": v2(6 * GIB, high=GIB)}, "/app")
    assert budget.available_memory() == GIB


def test_cgroup_v2_without_limit(machine):
    machine("cgroup2", {"app": v2(used=12 * GIB)}, "/app")
    assert budget.available_memory() == 8 * GIB


def test_cgroup_that_is_over_its_limit_has_nothing(machine):
    machine("cgroup2", {"app": v2(GIB, used=2 * GIB)}, "/app")
    assert budget.available_memory() == 0


def test_cgroup_v1(machine):
    files = {
        "memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory.usage_in_bytes": f"{GIB}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {512 * MIB}\n",
    }
    machine("cgroup", {"box/app": files}, "/box/app")
    assert budget.available_memory() == GIB + 512 * MIB


def test_cgroup_of_a_container_is_the_mount_itself(machine):
    machine("cgroup2", {".": v2(GIB)}, "/docker/abc", root="/docker/abc")
    assert budget.available_memory() == GIB


MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def real_cgroup():
    directory = MEMORY_CGROUP / f"edgeinfer-test-{os.getpid()}"
    try:
        directory.mkdir()
        (directory / "memory.limit_in_bytes").write_text(str(300 * MIB))
    except OSError as error:
        pytest.skip(f"memory cgroups (v1) are not writable here: {error}")
    yield directory
    directory.rmdir()


def test_limit_of_a_real_cgroup(real_cgroup):
    program = (
        f"open('{real_cgroup}/cgroup.procs', 'w').write('0')\n"
        "from edgeinfer import budget\n"
        "block = bytearray(b'x' * (100 << 20))\n"
        "print(budget.available_memory(), budget.default_budget())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    available, default = map(int, done.stdout.split())
    # 300 MiB less the block, less what Python took after it entered the group.
    assert 150 * MIB < available <= 200 * MIB
    assert default == available - available // 2


@pytest.mark.parametrize(
    "available, expected",
    [(20 * GIB, 18 * GIB), (2 * GIB, 2 * GIB - 512 * MIB), (512 * MIB, 256 * MIB), (0, 1)],
)
def test_default_budget_leaves_a_reserve(available, expected, monkeypatch):
    monkeypatch.setattr(budget, "available_memory", lambda: available)
    assert budget.default_budget() == expected


# This process


def test_process_memory_sees_a_large_block_come_and_go():
    if not budget.reset_peak():
        pytest.skip("this system cannot reset the peak")
    before = budget.process_memory()
    block = bytearray(os.urandom(1) * (64 * MIB))
    during = budget.process_memory()
    del block
    after = budget.process_memory()
    assert during.rss_bytes - before.rss_bytes > 60 * MIB
    assert after.rss_bytes < during.rss_bytes - 60 * MIB
    assert after.peak_rss_bytes >= during.rss_bytes - MIB
    assert budget.reset_peak()
    assert budget.process_memory().peak_rss_bytes < during.rss_bytes - 60 * MIB


def test_process_memory_equals_psutil():
    assert budget.process_memory().rss_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_process_memory_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_PROC", tmp_path)
    found = budget.process_memory()
    assert found.rss_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert found.peak_rss_bytes >= found.rss_bytes
    assert not budget.reset_peak()


# The ledger


def test_ledger_adds_up_and_reads_well():
    ledger = Ledger({"ring": 192 * MIB, "interpreter": 100 * MIB})
    assert ledger.total == 292 * MIB
    lines = ledger.table().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "Python and libraries",
        "ring for streamed weights",
        "total",
    ]
    assert lines[-1].endswith(" 292 MiB")


def test_ledger_is_frozen():
    entries = {"ring": 1}
    ledger = Ledger(entries)
    entries["ring"] = 2
    assert ledger.entries["ring"] == 1
    with pytest.raises(TypeError):
        ledger.entries["ring"] = 3


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"rings": 1}, "The ledger has no entry 'rings'. Expected one of interpreter,"),
        ({"ring": -1}, "The ledger's entry 'ring' must be a number of bytes, found -1"),
        ({"ring": 1.5}, "The ledger's entry 'ring' must be a number of bytes, found 1.5"),
    ],
)
def test_ledger_refuses(entries, words):
    with pytest.raises(BudgetError, match=re.escape(words)):
        Ledger(entries)
