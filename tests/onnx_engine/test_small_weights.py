"""Small weights in the file of a stock session are read alone: the kernel's own list says what was advised."""

import re
from pathlib import Path

import onnxruntime as ort
import pytest
from made_encoders import FLOAT, MIB, encoder_file
from onnx_references import THREADS

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import process_memory
from edgeinfer.engines.onnx import open_onnx


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


def test_small_weights_are_read_alone_and_large_ones_are_not(tmp_path):
    path = encoder_file(tmp_path, FLOAT)
    data = path.with_name(path.name + ".data")
    stock = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert not any(is_random for _, is_random in advised_random(data))
    del stock
    with open_onnx(path, memory=process_memory().rss_bytes + 400 * MIB, threads=THREADS) as model:
        assert model.mode == "in-memory"
        found = advised_random(data)
    assert {is_random for kib, is_random in found if kib <= 256} == {True}
    assert not any(is_random for kib, is_random in found if kib > 256)
