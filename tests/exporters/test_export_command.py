"""`edgeinfer export` as a user types it."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from tiny_checkpoints import add_tokenizer, tiny_checkpoint  # noqa: E402

import edgeinfer  # noqa: E402
from edgeinfer.cli import cli  # noqa: E402
from edgeinfer.modelfile import read_model_file  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # 256 is a block of the K-quants
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    tiny_checkpoint(folder, "llama", dtype="bfloat16", hidden_size=256, intermediate_size=512)
    add_tokenizer(folder)
    return folder


def _export(*arguments):
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_a_checkpoint_becomes_a_model_that_runs(checkpoint, tmp_path):
    result = _export(checkpoint, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 0, result.output
    assert (
        "out.gguf: llama, BF16, 21 tensors, 1,365,248 parameters" in result.output and "/s)" in result.output
    )
    with edgeinfer.load(tmp_path / "out.gguf", ctx=64) as model:
        text = "".join(model.generate("The river", max_tokens=4, temperature=0))
    assert isinstance(text, str) and model.stats.generated_tokens == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_json_and_check(checkpoint, tmp_path):
    result = _export(checkpoint, "-o", tmp_path / "out.gguf", "--quant", "f32", "--check", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["architecture"] == "llama" and facts["type"] == "F32" and facts["tensors"] == 21
    assert facts["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert facts["seconds"] >= facts["export_seconds"] > 0 and facts["notes"] == []
    assert facts["check"]["passed"] and facts["check"]["relative_difference"] < 1e-4


@pytest.mark.parametrize("type", ["Q8_0", "q4_k_m"])
def test_quantized_types_go_through_a_float_file_that_is_removed(checkpoint, tmp_path, type):
    result = _export(checkpoint, "-o", tmp_path / "out.gguf", "--quant", type, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["type"] == type.upper() and facts["quantization"]["bits_per_weight"] < 9
    file = read_model_file(tmp_path / "out.gguf")
    kinds = {tensor.type for tensor in file.tensors}
    assert all(tensor.offset % 4096 == 0 for tensor in file.tensors)
    assert kinds >= {"F32", "Q8_0" if type == "Q8_0" else "Q4_K"}
    assert facts["bytes"] == (tmp_path / "out.gguf").stat().st_size < facts["quantization"]["source_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_calibration_gathers_an_importance_matrix(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("The river ran on, and the mole ran with it. " * 40)
    result = _export(
        checkpoint, "-o", tmp_path / "out.gguf", "--quant", "Q4_K_M", "--calibration", tmp_path / "text.txt"
    )
    assert result.exit_code == 0, result.output
    assert "by the importance that" in result.output
    assert "quantize.imatrix.file" in read_model_file(tmp_path / "out.gguf").metadata


def test_a_failed_check_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """A transform that is left out is what the check is for."""
    from edgeinfer.exporters import tensor_writer

    def plain(source, target, head_rows, columns):
        target[:] = source

    monkeypatch.setattr(tensor_writer, "interleave_halves", plain)
    result = _export(checkpoint, "-o", tmp_path / "out.gguf", "--quant", "f32", "--check")
    assert result.exit_code == 1
    assert "The check failed, so nothing was written." in result.output and "FAILED" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_does_not_fit_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    from edgeinfer.exporters import to_gguf

    monkeypatch.setattr(to_gguf, "export_gguf", lambda *_arguments, **_options: pytest.fail("it was written"))
    result = _export(checkpoint, "-o", tmp_path / "out.gguf", "--check", "--memory", "64MiB")
    assert result.exit_code == 1 and "more than the 64.0 MiB of memory. Raise --memory" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_kept(checkpoint, tmp_path):
    (tmp_path / "out.gguf").write_bytes(b"old")
    result = _export(checkpoint, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1 and "exists already" in result.output and "--force" in result.output
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert _export(checkpoint, "-o", tmp_path / "out.gguf", "--force").exit_code == 0
    assert read_model_file(tmp_path / "out.gguf").architecture == "llama"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["CHECKPOINT", "-o", "none/out.gguf"], "The folder for the result does not exist"),
        (
            ["nothing", "-o", "out.gguf"],
            "nothing does not exist. Expected a checkpoint folder or an ONNX file",
        ),
        (["model.gguf", "-o", "out.gguf"], "is GGUF already. `edgeinfer quantize`"),
        (["model.onnx", "-o", "out.gguf", "--to", "gguf"], "is ONNX, which cannot become GGUF"),
        (["CHECKPOINT", "-o", "CHECKPOINT"], "is the source itself"),
        (["CHECKPOINT", "-o", "out.gguf", "--quant", "Q9"], "Q9"),
        (["CHECKPOINT", "-o", "out.gguf", "--quant", "auto"], "give --calibration FILE and --size 2GiB"),
        (["CHECKPOINT", "-o", "out.gguf", "--size", "1GiB"], "--size is for --quant auto"),
        (["CHECKPOINT", "-o", "out.gguf", "--calibration", "none.txt"], "none.txt does not exist"),
        (["CHECKPOINT", "-o", "out.gguf", "--calibration", __file__], "needs no --calibration"),
        (
            ["CHECKPOINT", "-o", "out.onnx", "--quant", "q4_0"],
            "--quant q4_0 is not for ONNX. Expected one of F32",
        ),
        (["CHECKPOINT", "-o", "out.onnx", "--size", "1GiB"], "--size is for GGUF"),
        (["CHECKPOINT", "-o", "out.onnx", "--memory", "100MiB"], "to ONNX takes up to"),
        (["CHECKPOINT", "-o", "out.gguf", "--memory", "1MiB"], "--memory allows 1.00 MiB. Give"),
        (["CHECKPOINT", "-o", "out.gguf", "--memory", "much"], "The size 'much' cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(checkpoint, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = _export(*(str(checkpoint) if word == "CHECKPOINT" else word for word in arguments))
    assert result.exit_code == 1, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_and_nothing_is_left(checkpoint, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    result = _export(tmp_path / "source", "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1 and "is a pickle: loading one can run any program" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("limit", [1 << 20, 200_000])
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, limit):
    """A limit on the size of files acts as a full disk does: while tensors or the header are written."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "edgeinfer", "export", str(checkpoint), "-o", str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "The disk is full, or the file would be too large" in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_known_before(checkpoint, tmp_path, monkeypatch):
    from edgeinfer.exporters import tensor_writer

    monkeypatch.setattr(tensor_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
    result = _export(checkpoint, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1 and "The disk is full" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_becomes_onnx(checkpoint, tmp_path):
    result = _export(checkpoint, "-o", tmp_path / "out.onnx", "--check", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["architecture"] == "llama" and "out.onnx.data" in facts["files"]
    assert facts["check"]["passed"] and facts["check"]["relative_difference"] < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == set(facts["files"])


def test_an_onnx_file_becomes_float16(tmp_path):
    source = Path(os.environ.get("EDGEINFER_TEST_DATA", "none")) / "onnx" / "resnet-tiny-beans.onnx"
    if not source.exists():
        pytest.skip("needs EDGEINFER_TEST_DATA")
    result = _export(source, "-o", tmp_path / "out.onnx", "--quant", "f16", "--check")
    assert result.exit_code == 0, result.output
    assert "ONNX graph, F16, 24 tensors" in result.output and "Checked against ONNX Runtime" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
    assert _export(source, "-o", tmp_path / "out.onnx").exit_code == 1
    assert _export(source, "-o", tmp_path / "out.onnx", "--force").exit_code == 0


def test_help_has_examples():
    result = _export("--help")
    assert result.exit_code == 0
    assert "edgeinfer export Qwen3-0.6B/ -o qwen3.gguf --check" in result.output
