"""What `edgeinfer run` on ONNX models says to bad input: files that are no model, wrong inputs, wrong options."""

import pickle

import numpy as np
import pytest
from onnx_kit import (
    AUDIO,
    IMAGES,
    MODELS,
    command,
    error_of,
    needs_data,
    run,
    running_sum,
    write_wav,
)

pytestmark = needs_data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x14S\x8e\xf4" * 100, "is not an ONNX model, or is damaged"),
        (b"hello world\n", "is not an ONNX model, or is damaged"),
        (b"<!DOCTYPE html><html>404</html>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        (b"", "is empty: expected an ONNX model"),
    ],
)
@pytest.mark.parametrize("name", ["run", "plan", "inspect"])
def test_what_is_named_onnx_and_is_none(tmp_path, content, words, name):
    (tmp_path / "m.onnx").write_bytes(content)
    more = ["--input", "x.npy"] if name == "run" else []
    assert words in error_of(command(name, tmp_path / "m.onnx", *more))


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def evil(path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    path.write_bytes(pickle.dumps(Evil()))


BAD = {
    "a missing file": (lambda path: None, "no input file"),
    "a pickled array": (pickled, "pickled Python objects, which are never loaded"),
    "a pickle": (evil, "none of .npy, .npz, PNG, JPEG and WAV"),
    "a cut .npy": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'"),
        "is not a .npy file",
    ),
    "a cut picture": (lambda path: path.write_bytes((IMAGES / "cat.png").read_bytes()[:9000]), "is broken"),
    "a cut .npz": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "is not a .npz file"),
    "another shape": (
        lambda path: np.save(path, np.zeros((1, 3, 8, 8), np.float32)),
        "expected shape [batch, sequence, 224, 224], got [1, 3, 8, 8]",
    ),
    "another rank": (lambda path: np.save(path, np.zeros(3, np.float32)), "got [3]"),
    "another type": (
        lambda path: np.save(path, np.zeros((1, 3, 224, 224))),
        "expected type float32, got float64",
    ),
    "a sound": (
        lambda path: write_wav(path, np.zeros(100)),
        "is a sound, but input 'pixel_values' is float32",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs(tmp_path, what):
    make, words = BAD[what]
    path = tmp_path / "in.npy"
    make(path)
    result = run(
        MODELS / "resnet-tiny-beans.onnx", "--input", f"pixel_values={path}", "-o", tmp_path / "out.npz"
    )
    assert words in error_of(result)
    assert not [entry for entry in tmp_path.iterdir() if entry != path]  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "nope=1"], "no input 'nope'. Its inputs are input (float32 [?, ?]), state"),
        ([], "No value is given for input (float32 [?, ?]). Say --input NAME=FILE"),
        (["--input", "sr=nine"], "no input file nine"),
        (["--input", "sr=1.5"], "int64, which cannot hold 1.5"),
        (["--input", "state=1"], "the one number 1 is not enough"),
        (["--input", "input=-", "--input", "-"], "Only one can"),
        (["--input", "input=1", "-o", "out.txt"], "expected a name that ends in .npz"),
        (["--input", "input=1", "-o", "nowhere/out.npz"], "folder for the result does not exist"),
        (["-p", "hello"], "takes no text"),
        (["--input", AUDIO / "jfk.wav", "--input", "sr=16000"], "Name its file as the only --input"),
    ],
)
def test_wrong_command_lines(arguments, words, tmp_path):
    assert words in error_of(run(MODELS / "silero_vad.onnx", *arguments, cwd=tmp_path, input=b""))


def test_options_of_the_other_kind_of_model():
    result = run(MODELS / "silero_vad.onnx", "-n", 5)
    assert result.returncode == 2 and b"-n is for a model that writes" in result.stderr
    result = command("run", "-p", "hi", "--input", "x.npy")
    assert result.returncode == 2 and b"--input is for an ONNX model; no MODEL was given" in result.stderr


@pytest.mark.parametrize(("name", "options"), [("none.onnx", ["-n", 5]), ("none.gguf", ["--input", "x.npy"])])
def test_a_model_that_is_not_there_is_said_before_its_options_are_judged(name, options, tmp_path):
    assert f"{name}: there is no such file" in error_of(run(tmp_path / name, *options))


def test_a_result_is_not_replaced_unasked(tmp_path):
    out = tmp_path / "out.npz"
    out.write_bytes(b"mine")
    arguments = ["--input", f"x={_npy(tmp_path)}", "-o", out]
    model = running_sum(tmp_path / "m.onnx")
    assert "exists already" in error_of(run(model, *arguments)) and out.read_bytes() == b"mine"
    assert run(model, *arguments, "--force").returncode == 0
    with np.load(out) as found:
        assert set(found.files) == {"y", "hn"}


def _npy(folder):
    np.save(folder / "x.npy", np.ones((1, 4), np.float32))
    return folder / "x.npy"
