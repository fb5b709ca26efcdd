"""`edgeinfer inspect` against the gguf package, and on files that are wrong or hostile."""

import json
import struct

import gguf as gguf_package
from click.testing import CliRunner
from gguf_bytes import STRING, data_folder, gguf, key, string, tensor

from edgeinfer.cli.inspect import inspect


def run(*arguments):
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def test_json_equals_gguf_package():
    path = data_folder() / "lm/stories260K-moe4x.gguf"
    result = run(path, "--json")
    facts = json.loads(result.stdout)
    tensors = gguf_package.GGUFReader(path).tensors
    assert [(t["name"], t["offset"], t["nbytes"]) for t in facts["tensors"]] == [
        (t.name, t.data_offset, t.n_bytes) for t in tensors
    ]
    assert facts["num_parameters"] == sum(int(t.n_elements) for t in tensors)
    assert facts["bytes_by_type"] == {"F32": sum(int(t.n_bytes) for t in tensors)}
    assert facts["bytes_by_group"]["experts"] == sum(int(t.n_bytes) for t in tensors if "_exps" in t.name)
    assert sum(facts["bytes_by_group"].values()) == facts["weights_bytes"]
    assert facts["parts"] == [{"path": str(path), "bytes": path.stat().st_size}]
    assert facts["metadata"]["tokenizer.ggml.tokens"] == {
        "element_type": "str",
        "length": 512,
        "values": None,
    }
    assert (facts["num_layers"], facts["num_experts"], facts["num_experts_used"]) == (5, 4, 2)


def test_table():
    lines = run(data_folder() / "lm/stories260K-moe4x.gguf").stdout.splitlines()
    for words in (
        "architecture  llama",
        "layers        5",
        "experts       4, 2 used a token",
        "context       2,048 tokens",
    ):
        assert any(line.strip() == words for line in lines), words
    assert any("experts" in line and "83.7%" in line for line in lines)
    assert any("ffn_gate_exps.weight (64 x 172 x 4)" in line for line in lines)


def test_vocabulary_only():
    result = run(data_folder() / "vocab/ggml-vocab-phi-3.gguf")
    assert result.exit_code == 0
    assert "vocabulary    32,064 tokens" in result.stdout
    assert "This file has a vocabulary only, no weights." in result.stdout


def test_errors_go_to_standard_error(tmp_path):
    result = run(tmp_path / "none.gguf", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr == f"Error: {tmp_path}/none.gguf: there is no such file. Check the path of the model.\n"
    )


def test_text_of_the_file_cannot_command_the_terminal(tmp_path):
    keys = [
        key(b"general.architecture", STRING, string(b"llama\x1b[2J")),
        key(b"general.name", STRING, string(b"a\r\nb\xff")),
        key(b"some.number", 12, struct.pack("<d", float("nan"))),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(keys, [tensor(b"x\x1b]0;y\x07", (8,))], bytes(32)))
    text = run(path).stdout
    assert r"llama\x1b[2J" in text and r"a\r\nb" in text and r"x\x1b]0;y\x07" in text
    assert "\x1b" not in text and "\r" not in text
    assert json.loads(run(path, "--json").stdout)["metadata"]["some.number"] == "nan"
