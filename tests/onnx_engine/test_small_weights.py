"""Small weights in the file of a stock session are read alone where memory is short: the kernel's own list says
what was advised.
"""

import re
from pathlib import Path

import onnxruntime as ort
import pytest
from made_encoders import FLOAT, MIB, encoder_file
from onnx_references import THREADS

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import process_memory
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.onnx import small_weights


def advised_random(path):
    """(KiB, whether it is read at random) of each mapping of the file at `path`."""
    found, is_ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Size:"):
            found.append((int(line.split()[1]), False))
        elif is_ours and line.startswith("VmFlags:"):
            found[-1] = (found[-1][0], "rr" in line.split())
    return found


def test_small_weights_are_read_alone_where_memory_is_short_and_large_ones_are_not(tmp_path, monkeypatch):
    path = encoder_file(tmp_path, FLOAT)
    data = path.with_name(path.name + ".data")
    stock = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert not any(is_random for _, is_random in advised_random(data))
    del stock
    options = {"memory": process_memory().rss_bytes + 400 * MIB, "threads": THREADS}
    with open_onnx(path, **options) as model:
        assert model.mode == "in-memory"
        assert not any(is_random for _, is_random in advised_random(data))
    monkeypatch.setattr(small_weights, "available_memory", lambda: data.stat().st_size - 1)
    with open_onnx(path, **options):
        found = advised_random(data)
    assert {is_random for kib, is_random in found if kib <= 256} == {True}
    assert not any(is_random for kib, is_random in found if kib > 256)
