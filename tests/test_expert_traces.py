"""Traces of used experts as files: read back, damaged, malformed, of another model."""

import io
import json
import zipfile

import numpy as np
import pytest
from small_traces import small_trace
from tiny import tiny_model

from edgeinfer.errors import TraceError
from edgeinfer.experts.trace import Trace, model_fingerprint
from edgeinfer.modelfile import read_model_file


@pytest.mark.parametrize("predicted", [None, np.array([[[-1, -1, -1], [2, 3, 0]]] * 3, np.int16)])
def test_a_written_trace_reads_the_same(predicted, tmp_path):
    trace = small_trace(predicted=predicted)
    trace.write(tmp_path / "trace.npz")
    again = Trace.read(tmp_path / "trace.npz")
    for name in ("model", "architecture", "fingerprint", "num_experts"):
        assert getattr(again, name) == getattr(trace, name)
    for name in ("routed", "decode", "expert_bytes", "predicted"):
        left, right = getattr(again, name), getattr(trace, name)
        assert np.array_equal(left, right) if right is not None else left is None
    assert (again.num_tokens, again.num_layers, again.num_used, again.num_keys) == (3, 2, 2, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_numpy_alone_can_read_it(tmp_path):
    small_trace().write(tmp_path / "trace.npz")
    arrays = np.load(tmp_path / "trace.npz", allow_pickle=False)
    assert json.loads(arrays["header"].tobytes())["format"] == "edgeinfer-trace"
    assert arrays["routed"].shape == (3, 2, 2)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    small_trace().write(tmp_path / "trace.npz")
    before = (tmp_path / "trace.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TraceError, match="cannot be written: No space left on device"):
        small_trace(num_experts=5).write(tmp_path / "trace.npz")
    assert (tmp_path / "trace.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_every_cut_of_a_trace_is_refused(tmp_path):
    small_trace().write(tmp_path / "trace.npz")
    whole = (tmp_path / "trace.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(TraceError, match="cut.npz cannot be used as a trace") as caught:
            Trace.read(cut)
        assert "edgeinfer trace" in str(caught.value)


def test_damage_is_refused_or_harmless(tmp_path):
    """A changed byte is found by the checksums, or lies where zip keeps nothing of the trace."""
    trace = small_trace()
    trace.write(tmp_path / "trace.npz")
    whole = (tmp_path / "trace.npz").read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = Trace.read(tmp_path / "bad.npz")
            assert np.array_equal(found.routed, trace.routed) and found.model == trace.model
        except TraceError:
            refused += 1
    assert refused > len(whole) / 3 / 2


def write_members(path, **changes):
    """A trace file with some arrays, or raw members, replaced; None leaves one out."""
    header = {"format": "edgeinfer-trace", "version": 1, "num_experts": 4}
    header |= {"model": "m", "architecture": "a", "fingerprint": "f"}
    header |= changes.pop("header_values", {})
    trace = small_trace()
    members = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    members |= {name: getattr(trace, name) for name in ("routed", "decode", "expert_bytes")}
    members |= changes
    with zipfile.ZipFile(path, "w") as file:
        for name, value in members.items():
            if isinstance(value, np.ndarray):
                data = io.BytesIO()
                np.lib.format.write_array(data, value, allow_pickle=True)
                value = data.getvalue()
            if value is not None:
                file.writestr(f"{name}.npy", value)


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


MALFORMED = {
    "another version": ({"header_values": {"version": 2}}, "Expected trace version 1, found 2"),
    "another format": ({"header_values": {"format": "x"}}, 'the format "edgeinfer-trace"'),
    "an unknown key": ({"header_values": {"more": 1}}, "in the header, found .*more"),
    "a number for a name": ({"header_values": {"model": 1}}, "Expected texts and a number of experts"),
    "true for a number": ({"header_values": {"num_experts": True}}, "Expected texts and a number of experts"),
    "no experts": ({"header_values": {"num_experts": 0}}, "Expected 1 to 16384 experts in a layer, found 0"),
    "a header that is no JSON": ({"header": np.frombuffer(b"{", np.uint8)}, "damaged"),
    "a header as a list": ({"header": np.frombuffer(b"[]", np.uint8)}, "found another one"),
    "a deep header": ({"header": np.frombuffer(b"[" * 200_000, np.uint8)}, "nested too deeply|damaged"),
    "no decode": (
        {"decode": None},
        "Expected the arrays decode.npy, .* found expert_bytes.npy, header.npy, routed",
    ),
    "one more array": ({"extra": np.zeros(1)}, "Expected the arrays"),
    "other numbers": (
        {"routed": np.zeros((3, 2, 2), np.int32)},
        "Expected routed as int16 with 3 dim.*found int32",
    ),
    "objects": (
        {"routed": np.array([{}], object)},
        "Expected routed as int16 with 3 dimensions, found object",
    ),
    "flat ids": ({"routed": np.zeros(12, np.int16)}, "found int16 with 1"),
    "an expert too many": ({"routed": np.full((3, 2, 1), 4, np.int16)}, "experts from 0 to 3 .*found 4"),
    "an expert below -1": ({"routed": np.full((3, 2, 1), -2, np.int16)}, "found -2"),
    "an expert twice": ({"routed": np.zeros((3, 2, 2), np.int16)}, "found one twice"),
    "padding in front": (
        {"routed": np.array([[[-1, 2]] * 2] * 3, np.int16)},
        "-1 only behind the routed experts",
    ),
    "a token without experts": (
        {"routed": np.full((3, 2, 2), -1, np.int16)},
        "decoded token .*found none for 1, 0",
    ),
    "no experts anywhere": (
        {"routed": np.full((3, 2, 2), -1, np.int16), "decode": np.zeros(3, bool)},
        "Expected routed experts, found none",
    ),
    "no tokens": ({"routed": np.zeros((0, 2, 2), np.int16)}, "Expected at least one token"),
    "too few phases": ({"decode": np.zeros(2, bool)}, r"Expected decode of shape \(3,\).*found \(2,\)"),
    "too many sizes": ({"expert_bytes": np.ones(3, np.int64)}, r"Expected expert_bytes of shape \(2,\)"),
    "experts of no bytes": (
        {"expert_bytes": np.array([1, 0])},
        "Expected experts of at least one byte, found 0",
    ),
    "predictions of other tokens": (
        {"predicted": np.full((2, 2, 1), -1, np.int16)},
        r"Expected predicted of shape \(3, 2, 1\)",
    ),
    "a predicted expert twice": ({"predicted": np.zeros((3, 2, 2), np.int16)}, "different predicted experts"),
    "a huge shape": (
        {"routed": npy(b"{'descr': '<i2', 'fortran_order': False, 'shape': (999999999, 999999, 9), }\n")},
        "bytes of routed for its shape",
    ),
    "a short array": (
        {"decode": npy(b"{'descr': '|b1', 'fortran_order': False, 'shape': (3,), }\n") + b"\x01\x01"},
        "Expected .* bytes of decode",
    ),
    "code for a shape": ({"decode": npy(b"__import__('os').getpid()\n")}, "damaged"),
    "no array": ({"decode": b"hello"}, "damaged"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_traces_are_refused(name, tmp_path):
    changes, message = MALFORMED[name]
    write_members(tmp_path / "bad.npz", **changes)
    with pytest.raises(TraceError, match=message):
        Trace.read(tmp_path / "bad.npz")


def test_the_malformed_ones_differ_from_a_good_one_only_there(tmp_path):
    write_members(tmp_path / "good.npz")
    assert Trace.read(tmp_path / "good.npz").num_tokens == 3


def test_foreign_and_missing_files_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(
        TraceError, match=r"Expected a trace \(an .npz file\), found a file that starts with b'GGUF'"
    ):
        Trace.read(tmp_path / "model.gguf")
    with pytest.raises(TraceError, match="No such file or directory"):
        Trace.read(tmp_path / "none.npz")
    with pytest.raises(TraceError, match="Is a directory"):
        Trace.read(tmp_path)


def test_a_trace_knows_its_model(tmp_path):
    first, second = (read_model_file(tiny_model(tmp_path, "olmoe", "Q4_0", layers=n)) for n in (2, 3))
    trace = small_trace(fingerprint=model_fingerprint(first), model="the first")
    trace.check_model(first)
    with pytest.raises(TraceError, match="recorded with the first .olmoe, fingerprint") as caught:
        trace.check_model(second)
    assert model_fingerprint(second)[:12] in str(caught.value) and second.paths[0].name in str(caught.value)
