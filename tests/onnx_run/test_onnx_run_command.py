"""`edgeinfer run` on ONNX models: known answers, and outputs as files."""

import json

import numpy as np
import pytest
from onnx import helper
from onnx_kit import (
    AUDIO,
    IMAGES,
    MODELS,
    bare_session,
    constant_model,
    error_of,
    needs_data,
    read_wav,
    run,
    save_model,
    write_wav,
)
from PIL import Image

pytestmark = needs_data


def answer(model, *arguments):
    result = run(model, *arguments, "--json")
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("picture", "classes", "name"),
    [("cat.png", [285, 281, 282], "Egyptian cat"), ("dog.jpg", [174, 249, 248], "Norwegian elkhound")],
)
def test_known_classes(picture, classes, name):
    found = answer(MODELS / "mobilenet_v2_int8_B.onnx", "--input", IMAGES / picture, "--top", 3)
    assert [entry["number"] for entry in found["classes"]] == classes
    assert found["classes"][0]["label"] == name
    assert 0 < found["classes"][2]["score"] < found["classes"][0]["score"] < 1


def test_known_boxes_are_found_and_drawn(tmp_path):
    out = tmp_path / "dog.png"
    result = run(MODELS / "FastestDet.onnx", "--input", IMAGES / "dog.jpg", "-o", out)
    assert result.returncode == 0, result.stderr.decode()
    lines = [line.split() for line in result.stdout.decode().splitlines()]
    assert [(line[1], line[0]) for line in lines] == [
        ("dog", "77.40%"),
        ("car", "76.76%"),
        ("bicycle", "75.08%"),
    ]
    drawn, before = (
        np.asarray(Image.open(out)).astype(int),
        np.asarray(Image.open(IMAGES / "dog.jpg")).astype(int),
    )
    assert drawn.shape == before.shape
    changed = np.abs(drawn - before).sum(axis=2) > 60
    assert (
        changed[250:500, 120:124].mean() > 0.5 and changed[250:500, 20:100].mean() < 0.01
    )  # the dog's left edge


def test_boxes_are_those_of_a_bare_session():
    """The same picture, prepared by hand, and the best cell of the grid decoded by hand."""
    picture = Image.open(IMAGES / "dog.jpg").resize((352, 352))
    pixels = np.asarray(picture, np.float32)[..., ::-1].transpose(2, 0, 1)[None] / 255
    raw = bare_session(MODELS / "FastestDet.onnx").run(None, {"input.1": np.ascontiguousarray(pixels)})[0][0]
    scores = raw[0] ** 0.6 * raw[5:] ** 0.4
    number, row, column = np.unravel_index(scores.argmax(), scores.shape)
    x, y, width, height = raw[1:5, row, column]
    centre = (column + np.tanh(x)) / 22 * 768, (row + np.tanh(y)) / 22 * 576
    size = 768 / (1 + np.exp(-width)), 576 / (1 + np.exp(-height))
    best = answer(MODELS / "FastestDet.onnx", "--input", IMAGES / "dog.jpg")["boxes"][0]
    assert best["number"] == number and best["score"] == pytest.approx(scores.max(), rel=1e-4)
    assert best["x1"] == pytest.approx(centre[0] - size[0] / 2, abs=0.1)
    assert best["y2"] == pytest.approx(centre[1] + size[1] / 2, abs=0.1)


def test_known_file_types(tmp_path):
    script = tmp_path / "nameless"
    script.write_text(
        "import os\n\n\ndef names(path):\n    return [entry.name for entry in os.scandir(path)]\n" * 8
    )
    for path, label in ((script, "python"), (AUDIO / "jfk.wav", "wav"), (IMAGES / "cat.png", "png")):
        best = answer(MODELS / "magika/model.onnx", "--input", path)["classes"][0]
        assert best["label"] == label and best["score"] > 0.98


def test_lines_of_a_drawn_page_are_found(tmp_path):
    from PIL import ImageDraw, ImageFont

    page = Image.new("RGB", (640, 480), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(28)
    places = [(40, 60), (40, 160), (200, 300)]
    for (x, y), text in zip(places, ("The first line of a page", "and a second one below", "and a third")):
        pen.text((x, y), text, fill="black", font=font)
    page.save(tmp_path / "page.png")
    found = answer(MODELS / "ppocrv3-det.onnx", "--input", tmp_path / "page.png")["regions"]
    assert len(found) == 3
    for box, (x, y) in zip(found, places):
        assert abs(box["x1"] - x) < 15 and box["y1"] < y + 14 < box["y2"] < y + 60


def test_outputs_equal_a_bare_session(tmp_path):
    arrays = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)}
    np.save(tmp_path / "in.npy", arrays["pixel_values"])
    model = MODELS / "resnet-tiny-beans.onnx"
    result = run(
        model, "--input", f"pixel_values={tmp_path / 'in.npy'}", "-o", tmp_path / "out.npz", "--threads", 1
    )
    assert result.returncode == 0, result.stderr.decode()
    with np.load(tmp_path / "out.npz") as found:
        assert found.files == ["logits"]
        np.testing.assert_array_equal(found["logits"], bare_session(model).run(None, arrays)[0])


def test_a_sound_from_standard_input(tmp_path):
    sound = AUDIO / "jfk.wav"
    vad = MODELS / "silero_vad.onnx"
    assert run(vad, "--input", sound, "-o", tmp_path / "file.npz").returncode == 0
    data = sound.read_bytes()
    at = data.index(b"data") + 4
    endless = data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]  # as ffmpeg writes into a pipe
    for number, (name, given) in enumerate((("-", data), ("input=-", data), ("-", endless))):
        out = tmp_path / f"{number}.npz"
        result = run(vad, "--input", name, "-o", out, input=given)
        assert result.returncode == 0, result.stderr.decode()
        with np.load(tmp_path / "file.npz") as one, np.load(out) as two:
            np.testing.assert_array_equal(one["output"], two["output"])


def test_an_array_from_standard_input_for_a_model_of_sounds(tmp_path):
    frame = np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32)
    np.save(tmp_path / "frame.npy", frame)
    vad, out = MODELS / "silero_vad.onnx", tmp_path / "o.npz"
    result = run(vad, "--input", "-", "-o", out, input=(tmp_path / "frame.npy").read_bytes())
    assert result.returncode == 0, result.stderr.decode()
    feeds = {"input": frame, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    with np.load(out) as found:
        np.testing.assert_array_equal(found["output"], bare_session(vad).run(["output"], feeds)[0])


def test_a_sound_for_a_model_that_nothing_is_known_of(tmp_path):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = save_model(
        tmp_path / "m.onnx", nodes, [("x", np.float32, [1, "n"])], [("y", np.float32, [1, "n"])]
    )
    sound = write_wav(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 100), 44100)
    result = run(model, "--input", sound, "-o", tmp_path / "o.npz")
    assert "given as it is, one channel of 44,100 samples a second" in result.stderr.decode()
    with np.load(tmp_path / "o.npz") as found:
        np.testing.assert_array_equal(found["y"], read_wav(sound)[None])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_said(monkeypatch):
    """onnxruntime-gpu without its libraries: ONNX Runtime goes on with the processor."""
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    result = run(MODELS / "FastestDet.onnx", "--input", IMAGES / "dog.jpg", "--provider", "cuda")
    assert result.returncode == 0 and b"dog" in result.stdout
    assert "Computed on cpu. CUDAExecutionProvider could not be loaded" in result.stderr.decode()


def test_one_array_needs_no_name_and_any_order_of_bytes(tmp_path):
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    np.savez(tmp_path / "one.npz", whatever=pixels)
    np.save(tmp_path / "big.npy", pixels.astype(">f4"))
    model = MODELS / "resnet-tiny-beans.onnx"
    wanted = bare_session(model).run(None, {"pixel_values": pixels})[0]
    for name in ("one.npz", "big.npy"):
        assert run(model, "--input", tmp_path / name, "-o", tmp_path / "o.npz", "--force").returncode == 0
        with np.load(tmp_path / "o.npz") as found:
            np.testing.assert_allclose(found["logits"], wanted, rtol=1e-5)


def test_boxes_want_their_picture(tmp_path):
    """An array tells nothing about the picture it was: its outputs are shown, not "No boxes found"."""
    np.save(tmp_path / "in.npy", np.zeros((1, 3, 352, 352), np.float32))
    model = MODELS / "FastestDet.onnx"
    shown = run(model, "--input", tmp_path / "in.npy")
    assert shown.returncode == 0 and shown.stdout.decode().startswith("758: float32 1 x 85 x 22 x 22")
    drawn = run(model, "--input", tmp_path / "in.npy", "-o", tmp_path / "o.png")
    assert "drawn on the picture that was given, and none was" in error_of(drawn)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    nothing = run(model, "--input", tmp_path / "black.png", "-o", tmp_path / "o.png")
    assert nothing.stdout.decode().strip() == "No boxes found." and (tmp_path / "o.png").exists()


def test_what_was_not_shown_of_a_batch_is_said(tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((2, 3, 224, 224), np.float32))
    result = run(MODELS / "resnet-tiny-beans.onnx", "--input", tmp_path / "in.npy")
    assert "the first of a batch of 2" in result.stderr.decode()


@pytest.mark.filterwarnings("error")
def test_broken_numbers_are_shown_without_a_warning(tmp_path):
    np.save(tmp_path / "in.npy", np.full((1, 3, 224, 224), np.nan, np.float32))
    result = run(MODELS / "resnet-tiny-beans.onnx", "--input", tmp_path / "in.npy")
    assert result.returncode == 0 and result.stdout.decode().count("nan%") == 3
    assert "Warning" not in result.stderr.decode()


def test_an_operator_that_is_not_there_is_named_without_noise(tmp_path):
    model = save_model(
        tmp_path / "m.onnx", [helper.make_node("Abs", ["x"], ["y"])], [("x", np.float32, [1])],
        [("y", np.float32, [1])],
    )  # fmt: skip
    model.write_bytes(model.read_bytes().replace(b"Abs", b"Foo"))
    words = error_of(run(model, "--input", "x=1"))
    assert "No Op registered for Foo" in words and "Load model from" not in words


def test_onnxruntime_reports_nothing_and_leaves_nothing_behind(tmp_path):
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    result = run(MODELS / "FastestDet.onnx", "--input", IMAGES / "dog.jpg", env=environment)
    assert result.returncode == 0, result.stderr.decode()
    assert not list(tmp_path.rglob("*"))


def test_inputs_of_one_npz_numbers_and_state(tmp_path):
    model = MODELS / "silero_vad.onnx"
    arrays = {"input": np.random.default_rng(0).standard_normal((1, 288)).astype(np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    whole = {**arrays, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(8000)}
    expected = bare_session(model).run(["output"], whole)[0]
    found = answer(model, "--input", tmp_path / "in.npz", "--input", "sr=8000", "--threads", 1)
    assert found["outputs"]["output"]["values"] == expected.tolist()
    assert found["outputs"]["stateN"]["shape"] == [2, 1, 128]


def test_standard_input():
    with open(IMAGES / "cat.png", "rb") as picture:
        found = run(MODELS / "mobilenet_v2_int8_B.onnx", "--input", "-", stdin=picture)
    assert found.returncode == 0 and found.stdout.split()[1] == b"285"


def test_a_whole_sound(tmp_path):
    out = tmp_path / "clean.wav"
    result = run(MODELS / "gtcrn_simple.onnx", "--input", AUDIO / "gtcrn_mix.wav", "-o", out, "--threads", 1)
    assert result.returncode == 0, result.stderr.decode()
    known = read_wav(AUDIO / "gtcrn_enh_stream.wav")
    np.testing.assert_allclose(read_wav(out)[: len(known)], known, atol=1e-3)


def test_labels_and_metadata(tmp_path):
    (tmp_path / "names.txt").write_text("healthy\nrust\nspots\n")
    found = answer(
        MODELS / "resnet-tiny-beans.onnx", "--input", IMAGES / "cat.png", "--labels", tmp_path / "names.txt"
    )
    assert [entry["label"] for entry in found["classes"]] == ["rust", "healthy", "spots"]
    assert sum(entry["score"] for entry in found["classes"]) == pytest.approx(1)
    scores = np.array([[0.1, 0.7, 0.2]])
    model = constant_model(
        tmp_path / "m.onnx", [1, 3, 8, 8], [("p", scores)], metadata=[("names", "{0: 'a', 1: 'b', 2: 'c'}")]
    )
    best = answer(model, "--input", IMAGES / "cat.png")["classes"][0]
    assert (best["label"], best["score"]) == ("b", pytest.approx(0.7))  # they were probabilities already


def test_boxes_of_other_forms(tmp_path):
    """Two boxes overlap, one is of another class: in pixels of an input of 64 x 64, the picture is 640 x
    800."""
    rows = np.zeros((1, 4, 85), np.float32)
    rows[0, :, :4] = [[32, 32, 16, 16], [33, 32, 16, 16], [32, 32, 16, 16], [10, 10, 4, 4]]
    rows[0, :, 4] = [0.9, 0.8, 0.7, 0.1]
    rows[0, [0, 1, 2, 3], [5, 5, 6, 5]] = 1.0
    five = constant_model(tmp_path / "five.onnx", [1, 3, 64, 64], [("output0", rows)])
    found = answer(five, "--input", IMAGES / "cat.png")["boxes"]
    assert [(box["label"], round(box["score"], 3)) for box in found] == [("person", 0.9), ("bicycle", 0.7)]
    # the whole picture is 51 x 64 of the input, beside grey on both sides (6 pixels on the left)
    assert found[0]["x1"] == pytest.approx((24 - 6) / (51 / 640), abs=1) and found[0]["y1"] == pytest.approx(
        300, abs=1
    )
    eight = np.delete(rows, 4, axis=2)
    eight[..., 4:] *= rows[..., 4:5]
    model = constant_model(tmp_path / "eight.onnx", [1, 3, 64, 64], [("output0", eight.transpose(0, 2, 1))])
    again = answer(model, "--input", IMAGES / "cat.png")["boxes"]
    assert [(box["label"], box["x1"], box["y2"]) for box in again] == [
        (box["label"], box["x1"], box["y2"]) for box in found
    ]
    fewer = answer(model, "--input", IMAGES / "cat.png", "--threshold", 0.8)["boxes"]
    assert [box["label"] for box in fewer] == ["person"]


def test_a_form_of_the_users_own(tmp_path):
    boxes = np.array([[[0.25, 0.5, 0.75, 1.0, 0.9]]])
    model = constant_model(tmp_path / "m.onnx", [1, 3, 32, 32], [("found", boxes)])
    form = {
        "about": "mine",
        "match": {},
        "boxes": {"boxes": "found", "classes": 4},
        "pictures": {"*": {"channels": "bgr"}},
    }
    (tmp_path / "mine.json").write_text(json.dumps(form))
    box = answer(model, "--input", IMAGES / "dog.jpg", "--form", tmp_path / "mine.json")["boxes"][0]
    assert [box[key] for key in ("x1", "y1", "x2", "y2")] == pytest.approx([192, 288, 576, 576])
    (tmp_path / "mine.json").write_text(json.dumps({**form, "boxs": 1}))
    assert "unknown keys ['boxs']" in error_of(run(model, "--input", "x", "--form", tmp_path / "mine.json"))
    assert "no form 'nope'. Known forms: fastestdet," in error_of(
        run(model, "--input", "x", "--form", "nope")
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (["--normalize", "none"], [0.0, 100.0, 200.0]),
        (["--normalize", "unit"], [0.0, 100 / 255, 200 / 255]),
        (["--normalize", "half"], [-1.0, 100 / 127.5 - 1, 200 / 127.5 - 1]),
        (["--normalize", "0.5,0.25,0/2"], [-0.25, (100 / 255 - 0.25) / 2, 200 / 510]),
        ([], [0.0, 100 / 255, 200 / 255]),
    ],
)
@pytest.mark.parametrize("shape", [[1, 3, 4, 6], [1, 4, 6, 3], ["n", 3, "h", "w"]])
def test_layout_and_normalization(tmp_path, shape, how, expected):
    model = save_model(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", np.float32, shape)],
        [("y", np.float32, shape)],
    )
    Image.new("RGB", (6, 4), (0, 100, 200)).save(tmp_path / "p.png")
    result = run(model, "--input", tmp_path / "p.png", "-o", tmp_path / "o.npz", *how)
    assert result.returncode == 0 and (b"normalization unit" in result.stderr) == (not how)
    with np.load(tmp_path / "o.npz") as found:
        assert found["y"].shape == tuple({"n": 1, "h": 4, "w": 6}.get(size, size) for size in shape)
        pixel = found["y"][0, 1, 1] if shape[-1] == 3 else found["y"][0, :, 1, 1]
    np.testing.assert_allclose(pixel, expected, rtol=1e-6)


@pytest.mark.parametrize(("how", "first"), [("stretch", 0), ("crop", 90), ("pad", 114)])
def test_how_a_picture_is_fitted(tmp_path, how, first):
    shape = [1, 3, 20, 20]
    model = save_model(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", np.float32, shape)],
        [("y", np.float32, shape)],
    )
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 90
    Image.fromarray(wide).save(tmp_path / "p.png")
    options = ["--resize", how, "--normalize", "none", "-o", tmp_path / "o.npz"]
    assert run(model, "--input", tmp_path / "p.png", *options).returncode == 0
    with np.load(tmp_path / "o.npz") as found:
        assert found["y"][0, 0, 0, 1] == pytest.approx(first, abs=4) and found["y"][
            0, 0, 10, 10
        ] == pytest.approx(90, abs=4)


def test_text_goes_through_the_tokenizer_beside_the_model(tmp_path):
    """An encoder's inputs, ids, mask and token types, come from one text."""
    from tiny_decoder import write_tokenizer

    tokenizer = write_tokenizer(tmp_path)
    ports = [
        (name, np.int64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in ports]
    outputs = [(f"{name}_out", kind, shape) for name, kind, shape in ports]
    model = save_model(tmp_path / "m.onnx", nodes, ports, outputs)
    (tmp_path / "t.txt").write_text("Once upon a time")
    expected = tokenizer.encode("Once upon a time").ids
    for arguments in (["-p", "Once upon a time"], ["--input", tmp_path / "t.txt"]):
        found = answer(model, *arguments)["outputs"]
        assert found["input_ids_out"]["values"] == [expected]
        assert found["attention_mask_out"]["values"] == [[1] * len(expected)]
        assert found["token_type_ids_out"]["values"] == [[0] * len(expected)]
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xff")
    assert "is not UTF-8 text" in error_of(run(model, "--input", tmp_path / "t.txt"))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer that can be used" in error_of(run(model, "-p", "x"))
    (tmp_path / "tokenizer.json").unlink()
    assert "A text needs a tokenizer: expected" in error_of(run(model, "-p", "x"))
