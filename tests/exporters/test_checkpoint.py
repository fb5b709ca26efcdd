"""Checkpoint folders are read as safetensors says, and what is damaged or dangerous is refused by name."""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.errors import ExportError, ModelFileError
from edgeinfer.exporters.checkpoint import read_checkpoint
from edgeinfer.exporters.safetensors_file import read_records

safetensors = pytest.importorskip("safetensors", reason='needs pip install "edgeinfer[export]"')
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def _file(path, header, data=bytes(22), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _changed(name, **entry):
    return {**GOOD, name: {**GOOD[name], **entry}}


def test_records_are_where_safetensors_finds_them(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones((3, 1), np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    records = read_records(tmp_path / "model.safetensors")
    for name, array in load_file(tmp_path / "model.safetensors").items():
        record = records.pop(name)
        assert record.shape == array.shape and record.num_bytes == array.nbytes
        assert data[record.offset : record.offset + record.num_bytes] == array.tobytes()
    assert not records


BROKEN = {
    "no header at all": (b"", None, b"", "found 4 bytes"),
    "longer than the file": (GOOD, 10_000, bytes(22), "says that it has 10,000 bytes, but"),
    "longer than allowed": (GOOD, 1 << 62, bytes(22), "at most 100,000,000 are allowed"),
    "no JSON": (b"{'a': 1}", None, bytes(22), "cannot be read"),
    "no object": (b"[1, 2, 3]", None, bytes(22), "not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', None, bytes(22), "cannot be read"),
    "spaces first": (b"  " + json.dumps(GOOD).encode(), None, bytes(22), "not a JSON object"),
    "a name twice": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
        b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
        None,
        bytes(2),
        "'a' is there twice",
    ),
    "nested deeply": (b'{"a":' + b"[" * 100_000, None, b"", "nested too deeply|cannot be read"),
    "entry is a list": ({"a": [1]}, None, b"", "expected dtype, shape and data_offsets"),
    "no offsets": (
        {"a": {"dtype": "F32", "shape": []}},
        None,
        bytes(4),
        "expected dtype, shape and data_offsets",
    ),
    "unknown dtype": (_changed("a", dtype="F33"), None, bytes(22), "'a': the dtype 'F33' is unknown"),
    "negative length": (_changed("a", shape=[-2, -2]), None, bytes(22), "'a': the shape"),
    "length no number": (_changed("a", shape=[2, True]), None, bytes(22), "'a': the shape"),
    "shape is huge": (_changed("a", shape=[1 << 40, 1 << 40]), None, bytes(22), "'a': F32 of shape"),
    "offsets backwards": (_changed("a", data_offsets=[16, 0]), None, bytes(22), "'a': F32 of shape"),
    "offset is negative": (_changed("a", data_offsets=[-16, 0]), None, bytes(22), "'a': the data_offsets"),
    "three offsets": (_changed("a", data_offsets=[0, 16, 16]), None, bytes(22), "not two counts"),
    "shape and bytes disagree": (_changed("a", shape=[2, 3]), None, bytes(22), "takes 24 bytes.*span 16"),
    "overlap": (_changed("b", data_offsets=[14, 20]), None, bytes(20), "'b' overlaps tensor 'a'"),
    "hole": (_changed("b", data_offsets=[18, 24]), None, bytes(24), "'b' leaves a hole after tensor 'a'"),
    "cut off": (GOOD, None, bytes(21), "describes .* bytes, but the file has"),
    "more than is described": (GOOD, None, bytes(30), "describes .* bytes, but the file has"),
    "metadata no texts": ({**GOOD, "__metadata__": {"n": 1}}, None, bytes(22), "not a map of texts"),
}

STRICTER = ("spaces first",)  # the format forbids it, the original reads it


@pytest.mark.parametrize("broken", BROKEN)
def test_a_header_that_lies_is_named(tmp_path, broken):
    header, length, data, words = BROKEN[broken]
    path = tmp_path / "model.safetensors"
    if header == b"":
        path.write_bytes(b"1234")
    else:
        _file(path, header, data, length)
    with pytest.raises(ModelFileError, match=words):
        read_records(path)
    if broken not in STRICTER:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(str(path), "np")


def test_good_file_of_these_tests_is_good(tmp_path):
    assert list(read_records(_file(tmp_path / "model.safetensors", GOOD))) == ["a", "b"]
    safetensors.safe_open(str(tmp_path / "model.safetensors"), "np")


@pytest.mark.parametrize("bytes_changed", [1, 3])
def test_random_damage_never_escapes(tmp_path, bytes_changed):
    good = _file(tmp_path / "good.safetensors", GOOD).read_bytes()
    rng = np.random.default_rng(bytes_changed)
    path = tmp_path / "bad.safetensors"
    for _ in range(400):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good) - 22, bytes_changed):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            records = read_records(path)
        except ModelFileError:
            continue
        assert sum(record.num_bytes for record in records.values()) <= 22


def _folder(tmp_path, config="{}"):
    (tmp_path / "config.json").write_text(config)
    return tmp_path


def _shards(folder, weight_map):
    _file(folder / "one.safetensors", {"a": {**GOOD["a"]}}, bytes(16))
    _file(folder / "two.safetensors", {"b": {**GOOD["b"], "data_offsets": [0, 6]}}, bytes(6))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    _shards(_folder(tmp_path), {"a": "one.safetensors", "b": "two.safetensors"})
    found = read_checkpoint(tmp_path).tensors
    assert {name: record.path.name for name, record in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_links_to_the_weights_are_followed_as_in_a_download_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    _file(tmp_path / "blobs" / "123", GOOD)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/123")
    assert set(read_checkpoint(_folder(tmp_path / "snapshot")).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "weight_map, words",
    [
        (
            {"a": "one.safetensors", "b": "three.safetensors"},
            "names the shard three.safetensors, which is missing",
        ),
        ({"a": "two.safetensors"}, "says that two.safetensors holds 'a', but it does not"),
        ({"a": "../one.safetensors"}, "'../one.safetensors', expected the name of a file in this folder"),
        ({"a": "/etc/passwd"}, "'/etc/passwd', expected the name of a file"),
        ({"a": 3}, "expected the name of a file"),
        ({"a": "a" * 300 + ".safetensors"}, "expected the name of a file"),
        ({"a": "one\0.safetensors"}, "expected the name of a file"),
        ({"a": "config.json"}, r"expected \*.safetensors"),
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, weight_map, words):
    _shards(_folder(tmp_path), weight_map)
    with pytest.raises(ModelFileError, match=words):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    _shards(_folder(tmp_path), {"b": "two.safetensors", "c": "three.safetensors"})
    _file(tmp_path / "three.safetensors", {"c": {**GOOD["a"]}}, bytes(16))
    _file(
        tmp_path / "two.safetensors", {**GOOD, "c": {"dtype": "U8", "shape": [0], "data_offsets": [22, 22]}}
    )
    found = read_checkpoint(tmp_path).tensors
    assert found["c"].path.name == "three.safetensors"  # as the index says
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"b": "two.safetensors", "d": "one.safetensors"}})
    )
    _file(tmp_path / "one.safetensors", {"a": GOOD["a"], "d": {**GOOD["b"]}})
    with pytest.raises(ModelFileError, match="tensor 'a' is in one.safetensors and in two.safetensors"):
        read_checkpoint(tmp_path)


def test_a_folder_that_may_not_be_looked_into():
    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which others may not enter
    user = os.geteuid()
    try:
        folder.chmod(0o644)
        if user == 0:  # root may look everywhere: look as nobody
            os.seteuid(65534)
        with pytest.raises(ExportError, match="no permission to look into this folder"):
            read_checkpoint(folder)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    (_folder(tmp_path) / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(
        ExportError, match=f"{name} is a pickle: loading one can run any program.*safetensors"
    ):
        read_checkpoint(tmp_path)
    with pytest.raises(ExportError, match=f"{name} is a pickle"):
        read_checkpoint(tmp_path / name)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ExportError, match="expected a checkpoint folder.*it does not exist"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ExportError, match="there is no config.json"):
        read_checkpoint(tmp_path)
    with pytest.raises(ExportError, match="found no weights"):
        read_checkpoint(_folder(tmp_path))
    _file(tmp_path / "consolidated.safetensors", GOOD)
    with pytest.raises(ExportError, match="expected model.safetensors .*, found consolidated.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(ExportError, match="expected a checkpoint folder.*a file is there"):
        read_checkpoint(tmp_path / "consolidated.safetensors")


@pytest.mark.parametrize(
    "config, words", [("{", "is not JSON"), ("[1]", "expected a JSON object, found list")]
)
def test_a_damaged_config(tmp_path, config, words):
    with pytest.raises(ModelFileError, match=words):
        read_checkpoint(_folder(tmp_path, config))
