"""Models in several files: all parts are found, and parts that do not belong together are refused."""

import os
import struct

import gguf as gguf_package
import pytest
from gguf_bytes import ARCHITECTURE, I32, gguf, key, tensor, u32
from modelfile_cases import DATA, refused, write_with_package

from edgeinfer.modelfile import read_model_file


@pytest.fixture
def parts(tmp_path):
    write_with_package(tmp_path / "m.gguf", split_max_tensors=3)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return paths


def test_split_model_equals_gguf_package(parts):
    model = read_model_file(parts[0])
    assert model.paths == tuple(parts)
    expected = [
        (t.name, part, t.data_offset, t.n_bytes)
        for part, path in enumerate(parts)
        for t in gguf_package.GGUFReader(path).tensors
    ]
    assert [(t.name, t.part, t.offset, t.nbytes) for t in model.tensors] == expected
    assert len(expected) == 7
    assert model.file_bytes == sum(path.stat().st_size for path in parts)


def test_split_with_missing_parts_names_them(parts):
    parts[1].unlink()
    parts[2].unlink()
    refused(
        parts[0],
        r"2 of the model's 3 parts are missing: m-00002-of-00003.gguf, m-00003-of-00003.gguf\. Put all",
    )


def test_split_given_by_second_part_names_the_first(parts):
    refused(parts[1], r"is part 2 of 3 of a model. Give its first part: m-00001-of-00003.gguf")


def test_split_with_renamed_first_part(parts):
    refused(
        parts[0].rename(parts[0].with_name("model.gguf")),
        r"must end in '-00001-of-00003.gguf'.*original names",
    )


def test_split_with_parts_mixed_up(parts):
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)
    refused(
        parts[0],
        r"m-00002-of.*says that it is split.no 2 of split.count 3, expected 1 of 3. The parts are mixed",
    )


def test_split_with_truncated_second_part(parts):
    os.truncate(parts[1], parts[1].stat().st_size - 64)
    refused(
        parts[0],
        r"m-00002-of-00003.gguf: truncated: its data ends at byte \d+, but the file ends at byte \d+",
    )


def split_key(name, value, form="H", value_type=2):
    return key(name, value_type, struct.pack("<" + form, value))


def split_files(write, *, total=2, second_name=b"b", second_no=None):
    """Two parts of one tensor each, wrong where the arguments say so."""
    count = split_key(b"split.count", 2)
    first_keys = [
        ARCHITECTURE,
        split_key(b"split.no", 0),
        count,
        key(b"split.tensors.count", I32, struct.pack("<i", total)),
    ]
    second_keys = [second_no or split_key(b"split.no", 1), count]
    write(gguf(second_keys, [tensor(second_name, (8,))], DATA), "s-00002-of-00002.gguf")
    return write(gguf(first_keys, [tensor(b"a", (8,))], DATA), "s-00001-of-00002.gguf")


def test_split_by_hand_is_accepted(write):
    assert [t.name for t in read_model_file(split_files(write)).tensors] == ["a", "b"]


def test_split_with_wrong_tensor_count(write):
    refused(split_files(write, total=3), r"'split.tensors.count' is 3, but the 2 parts have 2 tensors")


def test_split_with_the_same_tensor_twice(write):
    refused(
        split_files(write, second_name=b"a"),
        r"tensor 'a' is also in s-00001-of-00002.gguf. The parts are mixed",
    )


def test_split_key_of_another_type(write):
    path = split_files(write, second_no=u32(b"split.no", 1))
    refused(path, r"s-00002.*key 'split.no' of a split model must be a u16, found u32")


def test_split_count_that_is_huge_is_refused_quickly(write):
    keys = [ARCHITECTURE, split_key(b"split.no", 0), split_key(b"split.count", 65535)]
    path = write(gguf(keys, [tensor(b"a", (8,))], DATA), "s-00001-of-65535.gguf")
    refused(path, r"65534 of the model's 65535 parts are missing: .*, \.\.\.")
