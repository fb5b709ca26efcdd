"""`edgeinfer stream` as a user types it: sources, sinks, pipelines, what is late, what is wrong."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from onnx_kit import (
    AUDIO,
    IMAGES,
    MODELS,
    command,
    constant_model,
    error_of,
    needs_data,
    read_wav,
    running_sum,
    write_wav,
)
from PIL import Image

pytestmark = needs_data
VAD, CLEAN = MODELS / "silero_vad.onnx", MODELS / "gtcrn_simple.onnx"


def stream(*arguments, **options):
    return command("stream", *arguments, **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_when_somebody_speaks():
    result = stream(VAD, "-i", AUDIO / "jfk.wav")
    assert result.returncode == 0, result.stderr.decode()
    spans = [line.split() for line in result.stdout.decode().splitlines()]
    assert len(spans) >= 4 and {span[-1] for span in spans} == {"speech"}
    assert float(spans[0][0]) == pytest.approx(0.35, abs=0.05) and float(spans[0][3]) == pytest.approx(
        2.24, abs=0.1
    )
    words = result.stderr.decode()
    assert "11.0 s of sound, real-time factor" in words and "p99" in words and "none dropped" in words


def test_enhanced_to_a_file(tmp_path):
    out = tmp_path / "clean.wav"
    result = stream(CLEAN, "-i", AUDIO / "gtcrn_mix.wav", "-o", out, "--json", "--threads", 1)
    assert result.returncode == 0, result.stderr.decode()
    known = read_wav(AUDIO / "gtcrn_enh_stream.wav")
    np.testing.assert_allclose(read_wav(out)[: len(known)], known, atol=1e-3)
    report = json.loads(result.stdout)
    assert report["seconds"] == pytest.approx(156302 / 16000) and report["dropped"] == 0
    assert report["steps"] == {"gtcrn_simple": 612}
    assert 0 < report["latency"]["p50"] <= report["latency"]["p95"] <= report["latency"]["p99"]
    assert report["real_time_factor"] == pytest.approx(report["computing_seconds"] / report["seconds"])


def test_one_model_asks_for_the_other(tmp_path):
    sound = np.concatenate([np.zeros(32000), read_wav(AUDIO / "jfk.wav")[:32000], np.zeros(32000)])
    write_wav(tmp_path / "in.wav", sound)
    result = stream(CLEAN, "-i", tmp_path / "in.wav", "-o", tmp_path / "out.wav", "--gate", VAD, "--json")
    assert result.returncode == 0, result.stderr.decode()
    made = read_wav(tmp_path / "out.wav")
    assert len(made) == len(sound)
    assert not made[:32000].any() and made[40000:60000].any() and not made[-16000:].any()
    assert json.loads(result.stdout)["open_share"]["gtcrn_simple"] < 0.4
    described = {"stages": [{"model": str(VAD), "name": "ear"}, {"model": str(CLEAN), "gate": {"by": "ear"}}]}
    (tmp_path / "p.json").write_text(json.dumps(described))
    again = stream(tmp_path / "p.json", "-i", tmp_path / "in.wav", "-o", tmp_path / "again.wav")
    assert (
        again.returncode == 0 and (tmp_path / "again.wav").read_bytes() == (tmp_path / "out.wav").read_bytes()
    )


def test_raw_sound_from_a_pipe(tmp_path):
    sound = (read_wav(AUDIO / "jfk.wav") * 32768).astype("<i2")
    whole = stream(VAD, "-i", AUDIO / "jfk.wav", "-o", tmp_path / "file.npz")
    piped = stream(
        VAD, "-i", "-", "--raw", "s16", "--late", "wait", "-o", tmp_path / "pipe.npz", input=sound.tobytes()
    )
    twice = np.repeat(sound, 2).tobytes()
    stereo = stream(
        VAD, "-i", "-", "--raw", "s16:16000:2", "--late", "wait", "-o", tmp_path / "two.npz", input=twice
    )
    assert whole.returncode == piped.returncode == stereo.returncode == 0
    with (
        np.load(tmp_path / "file.npz") as one,
        np.load(tmp_path / "pipe.npz") as two,
        np.load(tmp_path / "two.npz") as three,
    ):
        assert one["output"].shape == (344, 1, 1)
        np.testing.assert_array_equal(one["output"], two["output"])
        np.testing.assert_array_equal(one["output"], three["output"])


def test_a_wav_file_from_a_pipe(tmp_path):
    """With its length, and as programs write it that do not know the length yet."""
    data = (AUDIO / "jfk.wav").read_bytes()
    at = data.index(b"data") + 4
    endless = data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
    spans = [stream(VAD, "-i", "-", "--late", "wait", input=sound).stdout for sound in (data, endless)]
    assert spans[0] == spans[1] == stream(VAD, "-i", AUDIO / "jfk.wav").stdout and b"speech" in spans[0]
    assert "is cut short" in error_of(stream(VAD, "-i", "-", "--late", "wait", input=data[:100]))


def test_a_model_of_several_rates_takes_that_of_the_sound(tmp_path):
    half = write_wav(tmp_path / "8k.wav", read_wav(AUDIO / "jfk.wav")[::2], 8000)
    result = stream(VAD, "-i", half, "-o", tmp_path / "o.npz", "--json")
    assert json.loads(result.stdout)["seconds"] == pytest.approx(11)
    whole = command("run", VAD, "--input", half, "-o", tmp_path / "whole.npz")
    assert whole.returncode == 0, whole.stderr.decode()
    with np.load(tmp_path / "o.npz") as one, np.load(tmp_path / "whole.npz") as two:
        assert one["output"].shape == (344, 1, 1)
        np.testing.assert_array_equal(one["output"], two["output"])


@pytest.mark.parametrize("raw", [[], ["--raw", "s16:8000"]])
def test_a_pipe_faster_than_real_time_loses_nothing_and_says_its_rate(tmp_path, raw):
    """`cat talk.wav | edgeinfer stream ...`: no rule for late pieces is given, and none is late."""
    half = write_wav(tmp_path / "8k.wav", read_wav(AUDIO / "jfk.wav")[::2], 8000)
    data = half.read_bytes()
    assert stream(VAD, "-i", half, "-o", tmp_path / "file.npz").returncode == 0
    result = stream(
        VAD, "-i", "-", *raw, "--json", "-o", tmp_path / "pipe.npz", input=data[44:] if raw else data
    )
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["dropped"] == 0 and report["seconds"] == pytest.approx(11)
    with np.load(tmp_path / "file.npz") as one, np.load(tmp_path / "pipe.npz") as two:
        np.testing.assert_array_equal(one["output"], two["output"])


def test_lines_of_json(tmp_path):
    assert stream(VAD, "-i", AUDIO / "jfk.wav", "-o", tmp_path / "o.jsonl").returncode == 0
    found = lines_of(tmp_path / "o.jsonl")
    assert len(found) == 344 and found[1]["time"] == 0.032 and found[1]["stage"] == "silero_vad"
    assert 0.67 < np.mean([entry["speech"] > 0.5 for entry in found[:343]]) < 0.69


def test_frames_and_state_from_a_pipe(tmp_path):
    frames = np.random.default_rng(0).standard_normal((5, 1, 4)).astype("<f4")
    model = running_sum(tmp_path / "m.onnx", "left", "right")
    arguments = [model, "-i", "-", "--late", "wait", "-o", tmp_path / "o.npz"]
    assert "--state OUTPUT=INPUT" in error_of(stream(*arguments, input=frames.tobytes()))
    result = stream(*arguments, "--state", "right=left", input=frames.tobytes())
    assert result.returncode == 0, result.stderr.decode()
    with np.load(tmp_path / "o.npz") as found:
        np.testing.assert_allclose(found["y"], np.cumsum(frames, axis=0), rtol=1e-5)


def test_a_classifier_runs_where_a_detector_finds_something(tmp_path):
    """The second model sees what the first one found: the box, cut out."""
    (tmp_path / "frames").mkdir()
    for name, picture in (("1.png", "cat.png"), ("2.jpg", "dog.jpg")):
        Image.open(IMAGES / picture).convert("RGB").save(tmp_path / "frames" / name)
    Image.new("RGB", (300, 200), "grey").save(tmp_path / "frames/3.png")
    (tmp_path / "frames/notes.txt").write_text("no picture")
    gate = {"by": "FastestDet", "labels": ["dog"], "crop": True}
    stages = [
        {"model": str(MODELS / "FastestDet.onnx")},
        {"model": str(MODELS / "mobilenet_v2_int8_B.onnx"), "gate": gate},
    ]
    (tmp_path / "p.json").write_text(json.dumps({"stages": stages}))
    result = stream(tmp_path / "p.json", "-i", tmp_path / "frames", "-o", tmp_path / "o.jsonl", "--json")
    assert result.returncode == 0, result.stderr.decode()
    found = lines_of(tmp_path / "o.jsonl")
    assert [(entry["picture"], entry["stage"]) for entry in found] == [
        ("1.png", "FastestDet"),
        ("2.jpg", "FastestDet"),
        ("2.jpg", "mobilenet_v2_int8_B"),
        ("3.png", "FastestDet"),
    ]
    assert [entry["label"] for entry in found[1]["findings"]] == ["dog", "car", "bicycle"]
    report = json.loads(result.stdout)
    assert report["steps"] == {"FastestDet": 3, "mobilenet_v2_int8_B": 1}
    assert report["open_share"] == {"mobilenet_v2_int8_B": pytest.approx(1 / 3)}
    box = found[1]["findings"][0]
    cut = Image.open(tmp_path / "frames/2.jpg").crop([round(box[key]) for key in ("x1", "y1", "x2", "y2")])
    cut.save(tmp_path / "cut.png")
    alone = command("run", MODELS / "mobilenet_v2_int8_B.onnx", "--input", tmp_path / "cut.png", "--json")
    assert [entry["number"] for entry in found[2]["findings"]] == [
        entry["number"] for entry in json.loads(alone.stdout)["classes"]
    ]


def test_in_real_time(tmp_path):
    write_wav(tmp_path / "in.wav", read_wav(AUDIO / "jfk.wav")[:48000])
    start = time.monotonic()
    result = stream(VAD, "-i", tmp_path / "in.wav", "--realtime", "--json", "--late", "wait", "--threads", 1)
    assert time.monotonic() - start > 3
    report = json.loads(result.stdout)
    assert report["seconds"] == pytest.approx(3) and report["latency"]["p50"] < 0.032


def test_what_is_too_late_is_dropped(tmp_path):
    """Sound that is piped faster than it can be enhanced: a live stream drops, and the result keeps its
    time."""
    sound = (np.tile(read_wav(AUDIO / "gtcrn_mix.wav"), 3) * 32767).astype("<i2")
    arguments = [CLEAN, "-i", "-", "--raw", "s16", "--queue", 2, "--json", "-o", tmp_path / "o.wav"]
    for late in ("drop-oldest", "drop-newest"):
        result = stream(*arguments, "--late", late, "--force", input=sound.tobytes())
        assert result.returncode == 0, result.stderr.decode()
        report = json.loads(result.stdout)
        assert report["dropped"] > 0 and report["seconds"] + report["dropped_seconds"] == pytest.approx(
            len(sound) / 16000
        )
        assert len(read_wav(tmp_path / "o.wav")) == len(sound)


def test_ctrl_c_keeps_what_was_made(tmp_path):
    line = [
        sys.executable,
        "-m",
        "edgeinfer",
        "stream",
        CLEAN,
        "-i",
        "-",
        "--raw",
        "s16",
        "-o",
        tmp_path / "o.wav",
    ]
    process = subprocess.Popen(
        list(map(str, line)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write((read_wav(AUDIO / "gtcrn_mix.wav")[:32000] * 32767).astype("<i2").tobytes())
    process.stdin.flush()
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert len(read_wav(tmp_path / "o.wav")) >= 30000


def cut_wav(folder):
    (folder / "cut.wav").write_bytes((AUDIO / "jfk.wav").read_bytes()[:100_001])
    return [VAD, "-i", folder / "cut.wav", "-o", folder / "o.wav.npz"]


WRONG = {
    "a cut sound": (cut_wav, "is cut short"),
    "no such file": (lambda folder: [VAD, "-i", folder / "none.wav"], "no input file"),
    "no sound": (lambda folder: [VAD, "-i", IMAGES / "cat.png"], "is not a WAV file"),
    "another rate": (
        lambda folder: [VAD, "-i", write_wav(folder / "a.wav", np.zeros(99), 44100)],
        "44,100 samples a second, the model takes 16,000. Give --resample",
    ),
    "no sound is made": (
        lambda folder: [VAD, "-i", AUDIO / "jfk.wav", "-o", folder / "o.wav"],
        "None of the models makes sound",
    ),
    "an unknown result": (
        lambda folder: [VAD, "-i", AUDIO / "jfk.wav", "-o", folder / "o.mp3"],
        "ends in .wav, .jsonl, .npz",
    ),
    "no pair": (lambda folder: [VAD, "-i", "x", "--state", "what"], "Expected OUTPUT=INPUT"),
    "a gate without a number": (
        lambda folder: [VAD, "-i", AUDIO / "jfk.wav", "--gate", CLEAN],
        "has no number to ask with",
    ),
    "a threshold alone": (
        lambda folder: [VAD, "-i", "x", "--threshold", 0.5],
        "--threshold is that of a gate",
    ),
    "an empty folder": (lambda folder: [MODELS / "FastestDet.onnx", "-i", folder], "There is no picture"),
    "a wrong encoding": (lambda folder: [VAD, "-i", "-", "--raw", "mp3"], "--raw mp3 cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong(tmp_path, what):
    make, words = WRONG[what]
    arguments = make(tmp_path)
    before = set(tmp_path.iterdir())
    assert words in error_of(stream(*arguments, input=b""))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("model", "data", "words"), [
    (VAD, bytes(2001), "ended in the middle of a sample: 1 of 2 bytes"),
    ("frames", bytes(40), "ended in the middle of a frame: 8 of 16 bytes"),
])  # fmt: skip
def test_a_stream_that_ends_in_the_middle(tmp_path, model, data, words):
    model = running_sum(tmp_path / "m.onnx") if model == "frames" else model
    result = stream(model, "-i", "-", "-o", tmp_path / "o.npz", "--late", "wait", input=data)
    assert words in error_of(result) and not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(("described", "words"), [
    ("{", "cannot be read as JSON"),
    ({"stages": []}, "at least one stage"),
    ({"stages": [{"modle": "x"}]}, "unknown keys ['modle']"),
    ({"stages": [{"model": "a.onnx"}, {"model": "a.onnx"}]}, "two stages have the name 'a'"),
    ({"stages": [{"model": "a.onnx", "gate": {"by": "b"}}]}, "waits for 'b', which is not a stage before it"),
    ({"stages": [{"model": "a.onnx", "closed": "loud"}]}, 'closed to be "silence" or "pass"'),
    ({"stages": [{"model": "none.onnx"}]}, "none.onnx"),
])  # fmt: skip
def test_wrong_pipelines(tmp_path, described, words):
    path = tmp_path / "p.json"
    path.write_text(described if isinstance(described, str) else json.dumps(described))
    assert words in error_of(stream(path, "-i", AUDIO / "jfk.wav"))


def test_models_of_two_kinds_are_no_pipeline(tmp_path):
    constant_model(tmp_path / "d.onnx", [1, 3, 8, 8], [("p", np.ones((1, 2)))])
    stages = [{"model": str(VAD)}, {"model": "d.onnx"}]
    (tmp_path / "p.json").write_text(json.dumps({"stages": stages}))
    words = error_of(stream(tmp_path / "p.json", "-i", AUDIO / "jfk.wav"))
    assert "Models on a sound and models on frames cannot be in one pipeline" in words
