"""What `edgeinfer layout` writes: the same keys, the same weights, at pages, in the order of use. Read by the
gguf package.
"""

import json
import re
import struct
import subprocess
import sys

import gguf
import gguf_bytes
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_copies import reordered
from test_bit_identity import split_file
from tiny import tiny_model

from edgeinfer.cli import cli
from edgeinfer.errors import BudgetError
from edgeinfer.exporters.layout import MERGES_EXPERTS, arrange, lay_out
from edgeinfer.exporters.order import by_name
from edgeinfer.exporters.rewrite import rewrite
from edgeinfer.modelfile import read_model_file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def keys_of(path):
    """Name -> bytes of the value with its type, in the order of the file."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def assert_same_tensor(found, expected):
    assert (found.tensor_type, found.shape.tolist()) == (expected.tensor_type, expected.shape.tolist())
    assert np.array_equal(found.data.view(np.uint8), expected.data.view(np.uint8))


# ---- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "olmoe", "gpt-oss"])
def test_every_tensor_is_there_at_a_page_with_its_bytes(models, tmp_path, arch):
    source, result = tiny_model(models, arch, "Q4_0"), tmp_path / "out.gguf"
    report = lay_out(source, result)
    before, after = tensors_of(source), tensors_of(result)
    assert after.keys() == before.keys() and report.tensors == len(before)
    for name, tensor in after.items():
        assert tensor.data_offset % 4096 == 0
        assert_same_tensor(tensor, before[name])
    assert report.file_bytes == result.stat().st_size and report.merged_layers == 0
    assert gguf_bytes.stock_accepts(result)


def test_tensors_follow_their_use(models, tmp_path):
    """What llama does in a layer is known: attention, then gate and up, then down."""
    shuffled = reordered(
        tiny_model(models, "llama", "Q4_0"),
        tmp_path / "in.gguf",
        lambda tensors: dict(sorted(tensors.items(), reverse=True)),
    )
    assert list(tensors_of(shuffled))[:2] == ["token_embd.weight", "output_norm.weight"]
    report = lay_out(shuffled, tmp_path / "out.gguf")
    names = list(tensors_of(tmp_path / "out.gguf"))
    assert report.order_from_graph
    assert names[0] == "token_embd.weight" and names[-2:] == ["output_norm.weight", "output.weight"]
    layers = [int(match[1]) for name in names if (match := re.match(r"blk\.(\d+)", name))]
    assert layers == sorted(layers)
    roles = [name.split(".")[2] for name in names if name.startswith("blk.1.")]
    assert roles[0] == "attn_norm" and roles[-1] == "ffn_down"
    assert {*roles[1:4]} == {"attn_q", "attn_k", "attn_v"} and roles[4:6] == ["attn_output", "ffn_norm"]
    assert {*roles[6:8]} == {"ffn_gate", "ffn_up"}


def test_experts_follow_their_router(models, tmp_path):
    lay_out(tiny_model(models, "mixtral", "Q4_0"), tmp_path / "out.gguf")
    roles = [name.split(".")[2] for name in tensors_of(tmp_path / "out.gguf") if name.startswith("blk.1.")]
    router = roles.index("ffn_gate_inp")
    assert {*roles[router + 1 : router + 3]} == {"ffn_gate_exps", "ffn_up_exps"}
    assert roles[router + 3] == "ffn_down_exps"


def test_a_model_that_llama_cannot_open_follows_its_names(models, tmp_path):
    def change(tensors):
        return {name: value for name, value in reversed(tensors.items()) if name != "blk.1.attn_q.weight"}

    broken = reordered(tiny_model(models, "llama", "Q4_0"), tmp_path / "in.gguf", change)
    report = lay_out(broken, tmp_path / "out.gguf")
    names = list(tensors_of(tmp_path / "out.gguf"))
    assert not report.order_from_graph and "names: the order of use could not be seen" in report.lines()[1]
    assert names[0] == "token_embd.weight" and set(names[-2:]) == {"output_norm.weight", "output.weight"}
    layers = [int(match[1]) for name in names if (match := re.match(r"blk\.(\d+)", name))]
    assert layers == sorted(layers) and len(names) == len(read_model_file(broken).tensors)


def test_vocabulary_without_weights(tmp_path):
    source = gguf_bytes.data_folder() / "vocab" / "ggml-vocab-llama-spm.gguf"
    report = lay_out(source, tmp_path / "out.gguf")
    assert report.tensors == 0 and gguf_bytes.stock_accepts(tmp_path / "out.gguf")
    before, after = gguf_bytes.stock_contents(source), gguf_bytes.stock_contents(tmp_path / "out.gguf")
    assert after[0] == [*before[0], ("general.alignment", "u32", None)] and len(before[0]) > 15
    expected = source.read_bytes()[24:].rstrip(b"\0")
    assert (tmp_path / "out.gguf").read_bytes()[24:].startswith(expected) and len(expected) > 500_000


# ---- merged experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["F32", "Q4_K"])
def test_merged_experts_hold_gate_and_then_up(models, tmp_path, type):
    source, result = tiny_model(models, "deepseek2", type), tmp_path / "out.gguf"
    report = lay_out(source, result)
    before, after = tensors_of(source), tensors_of(result)
    layers = [name for name in before if name.endswith("ffn_gate_exps.weight")]
    assert report.merged_layers == len(layers) > 0
    for name in layers:
        gate, up = before.pop(name), before.pop(name.replace("gate", "up"))
        merged = after.pop(name.replace("gate", "gate_up"))
        assert merged.tensor_type == gate.tensor_type and merged.data_offset % 4096 == 0
        assert np.array_equal(
            merged.data, np.concatenate([gate.data, up.data], axis=1)
        )  # (expert, row, bytes)
        assert merged.shape.tolist() == [gate.shape[0], 2 * gate.shape[1], gate.shape[2]]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert_same_tensor(tensor, before[name])


def test_no_merge(models, tmp_path):
    source = tiny_model(models, "deepseek2", "Q4_0")
    report = lay_out(source, tmp_path / "out.gguf", merge=False)
    assert report.merged_layers == 0 and tensors_of(tmp_path / "out.gguf").keys() == tensors_of(source).keys()


def test_gate_and_up_that_are_not_alike_stay_apart(models, tmp_path):
    def change(tensors):
        name = "blk.1.ffn_up_exps.weight"
        data = gguf.dequantize(*tensors[name])
        return {
            **tensors,
            name: (gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0),
        }

    source = reordered(tiny_model(models, "deepseek2", "Q4_0"), tmp_path / "in.gguf", change)
    lay_out(source, tmp_path / "out.gguf")
    roles = {name for name in tensors_of(tmp_path / "out.gguf") if "_exps" in name and "down" not in name}
    assert roles == {
        "blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.2.ffn_gate_up_exps.weight"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["blk.1.ffn_gate_exps.bias", "blk.1.ffn_up_exps.scale"])
def test_experts_with_something_beside_their_weights_stay_apart(models, tmp_path, name):
    def change(tensors):
        return {**tensors, name: (np.ones(8, np.float32), gguf.GGMLQuantizationType.F32)}

    source = reordered(tiny_model(models, "deepseek2", "Q4_0"), tmp_path / "in.gguf", change)
    file = read_model_file(source)
    placed = {tensor.name for tensor in arrange(file, by_name(file))}
    assert "blk.1.ffn_gate_exps.weight" in placed and "blk.2.ffn_gate_up_exps.weight" in placed


@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe", "olmoe", "grovemoe", "gpt-oss"])
def test_architectures_that_do_not_know_merged_experts(models, arch):
    file = read_model_file(tiny_model(models, arch, "Q4_0"))
    assert file.architecture not in MERGES_EXPERTS
    assert [tensor.name for tensor in arrange(file, by_name(file))] == by_name(file)


# ---- keys ------------------------------------------------------------------------------------------------


def odd_keys():
    """Values that a detour through Python numbers or text would change."""
    key, array = gguf_bytes.key, gguf_bytes.array
    return [
        gguf_bytes.ARCHITECTURE,
        key(b"llama.nan", 6, struct.pack("<I", 0x7FA12345)),
        key(b"llama.pi", 12, struct.pack("<d", 3.141592653589793)),
        key(b"llama.largest", 10, struct.pack("<Q", 2**64 - 1)),
        key(b"llama.flag", 7, b"\1"),
        key(b"general.name", 8, gguf_bytes.string(b"not \xff UTF-8 \0")),
        array(b"llama.texts", 8, 2, gguf_bytes.string(b"") + gguf_bytes.string(b"\xc3\x28")),
        array(b"llama.floats", 6, 300, struct.pack("<300f", *(1 / (i + 1) for i in range(300)))),
        array(b"llama.nothing", 5, 0, b""),
    ]


def write_odd(path, keys, *, version=3):
    tensors = [
        gguf_bytes.tensor(b"output.weight", (4, 2)),
        gguf_bytes.tensor(b"token_embd.weight", (4, 2), 32),
    ]
    data = np.arange(16, dtype=np.float32).tobytes()
    path.write_bytes(gguf_bytes.gguf(keys, tensors, data, version=version))


@pytest.mark.parametrize("version", [2, 3])
def test_keys_are_kept_to_the_byte(tmp_path, version):
    source, result = tmp_path / "in.gguf", tmp_path / "out.gguf"
    write_odd(source, odd_keys(), version=version)
    lay_out(source, result)
    data = result.read_bytes()
    alignment = gguf_bytes.u32(b"general.alignment", 4096)
    count = len(odd_keys()) + 1
    assert data.startswith(
        b"GGUF" + struct.pack("<IQQ", version, 2, count) + b"".join(odd_keys()) + alignment
    )
    assert gguf_bytes.stock_contents(result)[0][:-1] == gguf_bytes.stock_contents(source)[0]
    names, offsets, _ = zip(*gguf_bytes.stock_contents(result)[1])
    assert names == ("token_embd.weight", "output.weight") and len(data) == 4096 * 3
    assert np.array_equal(np.frombuffer(data, np.float32, 8, offsets[0]), np.arange(8, 16))


@pytest.mark.parametrize(("there", "expected"), [(32, 4096), (4096, 4096), (16384, 16384)])
def test_alignment_changes_where_it_stands(tmp_path, there, expected):
    keys = odd_keys()
    source, result = tmp_path / "in.gguf", tmp_path / "out.gguf"
    keys.insert(3, gguf_bytes.u32(b"general.alignment", there))
    tensors, data = [gguf_bytes.tensor(b"token_embd.weight", (4, 2))], bytes(range(32))
    source.write_bytes(gguf_bytes.gguf(keys, tensors, data, alignment=there))
    report = lay_out(source, result)
    keys[3] = gguf_bytes.u32(b"general.alignment", expected)
    written = result.read_bytes()
    assert written[24:].startswith(b"".join(keys)) and report.alignment == expected
    assert written[expected : expected + 32] == data and len(written) == 2 * expected


def test_split_model_becomes_the_one_file_that_the_whole_one_becomes(models, tmp_path):
    whole = reordered(tiny_model(models, "deepseek2", "Q4_0"), tmp_path / "whole.gguf", dict)
    first, *others = split_file(whole, tmp_path, tensors=7)
    assert len(others) >= 3
    lay_out(whole, tmp_path / "from-whole.gguf")
    lay_out(first, tmp_path / "from-parts.gguf")
    assert not any(key.startswith("split.") for key in keys_of(tmp_path / "from-parts.gguf"))
    assert (tmp_path / "from-parts.gguf").read_bytes() == (tmp_path / "from-whole.gguf").read_bytes()


@pytest.mark.parametrize("arch", ["gemma3", "deepseek2"])
def test_laying_out_again_changes_nothing(models, tmp_path, arch):
    lay_out(tiny_model(models, arch, "Q4_0"), tmp_path / "once.gguf")
    lay_out(tmp_path / "once.gguf", tmp_path / "twice.gguf")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_bytes", [1000, 4096, 100_000, 1 << 20])
def test_buffers_of_any_size_give_the_same_file(models, tmp_path, buffer_bytes):
    """Experts of this model have 73,728 bytes a matrix: below, between and above these buffers."""
    file = read_model_file(tiny_model(models, "deepseek2", "Q4_0"))
    tensors = arrange(file, by_name(file))
    fractions = []
    for name in ("large.gguf", "small.gguf"):
        (tmp_path / name).touch()
    rewrite(file, tensors, tmp_path / "large.gguf", alignment=4096, buffer_bytes=8 << 20)
    rewrite(
        file,
        tensors,
        tmp_path / "small.gguf",
        alignment=4096,
        buffer_bytes=buffer_bytes,
        progress=fractions.append,
    )
    assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "large.gguf").read_bytes()
    assert (
        fractions == sorted(fractions)
        and 0 < fractions[0] < 1
        and fractions[-1] <= 1
        and fractions[-1] > 0.99
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory as Linux tells it")
def test_stays_within_memory(tmp_path):
    """A model of 300 MB, whose largest matrices have 19 MB, through 120 MiB."""
    source = tiny_model(tmp_path, "deepseek2", "Q8_0", embedding=1024, ffn=1024, experts=32)
    assert source.stat().st_size > 250e6
    limit = 120 << 20
    script = (
        "import sys; from edgeinfer.budget import process_memory; from edgeinfer.exporters import layout\n"
        "report = layout.lay_out(*sys.argv[1:3], memory=int(sys.argv[3]))\n"
        "print(process_memory().peak_rss_bytes, report.merged_layers, report.order_from_graph)"
    )
    command = [sys.executable, "-c", script, source, tmp_path / "out.gguf", str(limit)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, merged, from_graph = answer.split()
    assert int(peak) < limit and (merged, from_graph) == ("2", "True")


def test_memory_that_is_too_small(models, tmp_path):
    source = tiny_model(models, "llama", "Q4_0")
    with pytest.raises(
        BudgetError, match=r"--memory of 1\.00 MiB is too small .*: the smallest that works is"
    ) as caught:
        lay_out(source, tmp_path / "out.gguf", memory=1 << 20)
    lay_out(source, tmp_path / "out.gguf", memory=caught.value.smallest_bytes + (4 << 20))
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


# ---- the command -----------------------------------------------------------------------------------------


def test_command(models, tmp_path):
    source, result = tiny_model(models, "deepseek2", "Q4_0"), tmp_path / "out.gguf"
    answer = CliRunner().invoke(cli, ["layout", str(source), "-o", str(result)])
    assert answer.exit_code == 0
    assert re.search(r"out\.gguf: .* MiB, written in", answer.output)
    assert re.search(r"\d+ tensors at multiples of 4096 bytes, in the order of their use", answer.output)
    assert "gate and up of each expert side by side in 2 layers" in answer.output


def test_command_as_json(models, tmp_path):
    source, result = tiny_model(models, "deepseek2", "Q4_0"), tmp_path / "out.gguf"
    answer = CliRunner().invoke(cli, ["layout", str(source), "-o", str(result), "--no-merge", "--json"])
    facts = json.loads(answer.output)
    assert facts["path"] == str(result) and facts["merged_layers"] == 0 and facts["order_from_graph"] is True
    assert (
        facts["file_bytes"] == result.stat().st_size and facts["alignment"] == 4096 and facts["seconds"] > 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.gguf", "-o", "out.gguf"], "there is no such file"),
        (["{source}", "-o", "no/such/out.gguf"], "The folder for the result does not exist"),
        (["{source}", "-o", "out.gguf", "--memory", "lots"], "cannot be read"),
    ],
)
def test_command_with_bad_input(models, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    source = tiny_model(models, "llama", "Q4_0")
    answer = CliRunner().invoke(cli, ["layout", *(argument.format(source=source) for argument in arguments)])
    assert answer.exit_code == 1 and message in answer.output
    assert not list(tmp_path.iterdir())
