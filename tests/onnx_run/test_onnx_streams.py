"""Models on a stream, against a bare ONNX Runtime loop over the whole sound."""

import numpy as np
import pytest
from onnx import helper
from onnx_kit import AUDIO, MODELS, bare_session, needs_data, read_wav, running_sum
from onnx_kit import save_model as save

import edgeinfer
from edgeinfer.errors import EngineError, InputError
from edgeinfer.streams.description import GateDescription, StageDescription
from edgeinfer.streams.pipeline import open_pipeline
from edgeinfer.streams.running import run_pipeline

SILERO = ["silero_vad.onnx", "silero_vad_16k_op15.onnx"]


def speech(path, sound, window=512, context=64, rate=16000):
    """Probabilities of speech, as the model's own authors compute them: one window behind 64 samples of
    context."""
    session = bare_session(path)
    sound = np.concatenate([sound, np.zeros(-len(sound) % window, np.float32)])
    state, before, found = np.zeros((2, 1, 128), np.float32), np.zeros(context, np.float32), []
    for start in range(0, len(sound), window):
        frame = np.concatenate([before, sound[start : start + window]])
        before = frame[-context:]
        value, state = session.run(None, {"input": frame[None], "state": state, "sr": np.array(rate)})
        found.append(value[0, 0])
    return np.array(found)


def pieces(sound, size):
    return [sound[start : start + size] for start in range(0, len(sound), size)]


@needs_data
@pytest.mark.parametrize("name", SILERO)
@pytest.mark.parametrize("size", [160, 512, 7001])
def test_speech_equals_a_bare_loop(name, size):
    sound = read_wav(AUDIO / "jfk.wav")
    with edgeinfer.load(MODELS / name, threads=1) as model:
        steps = list(model.stream().over(pieces(sound, size)))
    found = np.array([step.value for step in steps])
    np.testing.assert_array_equal(found, speech(MODELS / name, sound))
    assert 0.67 < (found[:343] > 0.5).mean() < 0.69  # known of this recording
    assert sum(step.seconds for step in steps) == pytest.approx(len(sound) / 16000)
    assert [step.start_seconds for step in steps] == pytest.approx(
        [0.032 * number for number in range(len(steps))]
    )


@needs_data
def test_another_rate_has_its_own_window():
    sound = read_wav(AUDIO / "jfk.wav")[::2]
    with edgeinfer.load(MODELS / "silero_vad.onnx", threads=1) as model:
        stream = model.stream(rate=8000)
        found = [step.value for step in stream.feed(sound) + stream.finish()]
        with pytest.raises(InputError, match="takes 8,000, 16,000 samples a second, not 44,100"):
            model.stream(rate=44100)
    np.testing.assert_array_equal(found, speech(MODELS / "silero_vad.onnx", sound, 256, 32, 8000))


@pytest.fixture(scope="module")
def enhanced():
    """gtcrn on its whole recording in one piece."""
    with edgeinfer.load(MODELS / "gtcrn_simple.onnx", threads=1) as model:
        stream = model.stream()
        stream.feed(read_wav(AUDIO / "gtcrn_mix.wav"))
        stream.finish()
        return stream.take_sound()


@needs_data
def test_enhanced_speech_is_the_known_one(enhanced):
    known = read_wav(AUDIO / "gtcrn_enh_stream.wav")
    assert len(enhanced) == len(read_wav(AUDIO / "gtcrn_mix.wav"))
    np.testing.assert_allclose(enhanced[: len(known)], known, atol=1e-3)


@needs_data
@pytest.mark.parametrize("size", [100, 256, 5000])
def test_enhanced_speech_does_not_depend_on_the_pieces(enhanced, size):
    sound = read_wav(AUDIO / "gtcrn_mix.wav")[:40000]
    with edgeinfer.load(MODELS / "gtcrn_simple.onnx", threads=1) as model:
        stream = model.stream()
        made = []
        for piece in pieces(sound, size):
            stream.feed(piece)
            made.append(stream.take_sound())
        stream.finish()
        made = np.concatenate([*made, stream.take_sound()])
    assert len(made) == len(sound)
    np.testing.assert_allclose(made[:39000], enhanced[:39000], atol=1e-6)


@needs_data
def test_enhancement_runs_only_where_there_is_speech():
    """Each open stretch is enhanced as if it were a recording of its own; the rest is silence, or passes."""
    sound = np.concatenate([np.zeros(16000, np.float32), read_wav(AUDIO / "jfk.wav")[: 16000 * 6]])
    gate = GateDescription(by="vad", hold=0.2, lead=0.1)
    stages = [
        StageDescription(MODELS / SILERO[0], "vad"),
        StageDescription(MODELS / "gtcrn_simple.onnx", "clean", gate=gate),
    ]
    steps = []
    with open_pipeline(stages, threads=1) as pipeline:
        report = run_pipeline(pipeline, pieces(sound, 512), steps.extend)
        made = pipeline.sound_source.take_sound()
        gate = pipeline.gates["clean"]
    assert len(made) == len(sound) == gate.samples
    left_out = [step.step for step in steps if step.name == "clean" and step.step.left_out]
    shut = np.zeros(len(sound), bool)
    for step in left_out:
        start = round(step.start_seconds * 16000)
        shut[start : start + round(step.seconds * 16000)] = True
    assert shut.sum() + gate.open_samples == len(sound)
    assert not made[shut].any() and shut[:10000].all()
    assert (
        report.open_share["clean"] == pytest.approx(1 - shut.mean())
        and 0.2 < report.open_share["clean"] < 0.9
    )
    edges = np.flatnonzero(np.diff(np.concatenate([[True], shut, [True]]).astype(int)))
    with edgeinfer.load(MODELS / "gtcrn_simple.onnx", threads=1) as model:
        for start, end in zip(edges[::2], edges[1::2]):
            stream = model.stream()
            stream.feed(sound[start:end])
            stream.finish()
            np.testing.assert_allclose(made[start:end], stream.take_sound(), atol=1e-6)


@needs_data
def test_a_shut_gate_can_let_the_sound_pass():
    sound = read_wav(AUDIO / "gtcrn_mix.wav")[:16000]
    never = GateDescription(by="vad", above=2.0)
    stages = [
        StageDescription(MODELS / SILERO[0], "vad"),
        StageDescription(MODELS / "gtcrn_simple.onnx", "clean", gate=never, closed="pass"),
    ]
    with open_pipeline(stages, threads=1) as pipeline:
        report = run_pipeline(pipeline, pieces(sound, 300), lambda steps: None)
        made = pipeline.sound_source.take_sound()
    np.testing.assert_array_equal(made, sound)
    assert report.steps["clean"] == 0 and report.open_share["clean"] == 0


@needs_data
def test_lost_pieces_leave_silence_and_keep_the_time():
    sound = read_wav(AUDIO / "gtcrn_mix.wav")[: 256 * 40]
    with edgeinfer.load(MODELS / "gtcrn_simple.onnx", threads=1) as model:
        stream = model.stream()
        first = stream.feed(sound[: 256 * 10]) + stream.skip(256 * 5)
        rest = stream.feed(sound[256 * 15 :]) + stream.finish()
        made = stream.take_sound()
    assert len(made) == len(sound)
    assert not made[256 * 10 : 256 * 15].any() and made[256 * 15 :].any()
    assert rest[0].start_seconds == pytest.approx(256 * 15 / 16000)
    assert first[-1].left_out and first[-1].start_seconds == pytest.approx(256 * 10 / 16000)


def test_state_goes_from_step_to_step(tmp_path):
    with edgeinfer.load(running_sum(tmp_path / "m.onnx")) as model:
        stream = model.stream()
        assert stream.state == {"h": "hn"} and stream.input.name == "x"
        inputs = np.random.default_rng(0).standard_normal((6, 1, 4)).astype(np.float32)
        found = np.stack([step.outputs["y"] for step in stream.over(inputs)])
        np.testing.assert_allclose(found, np.cumsum(inputs, axis=0), rtol=1e-6)
        stream.reset()
        np.testing.assert_array_equal(stream.feed(inputs[0])[0].outputs["y"], inputs[0])


def test_pairs_that_are_named_count(tmp_path):
    path = running_sum(tmp_path / "m.onnx", "left", "right")
    with edgeinfer.load(path) as model:
        with pytest.raises(InputError) as error:
            model.stream()
        for words in (
            "unclear which input",
            "x (float32 [1, 4]; outputs like it: y, right)",
            "--state OUTPUT=INPUT",
        ):
            assert words in str(error.value)
        stream = model.stream(state={"left": "right"})
        one = np.ones((1, 4), np.float32)
        assert [float(stream.feed(one)[0].outputs["y"][0, 0]) for _ in range(3)] == [1, 2, 3]


def test_a_model_without_state_runs_frame_by_frame(tmp_path):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [("x", np.float32, [1, 2])],
        [("y", np.float32, [1, 2])],
    )
    with edgeinfer.load(path) as model:
        steps = list(model.stream().over([np.full((1, 2), value, np.float32) for value in (1, 2)]))
    assert [float(step.outputs["y"][0, 0]) for step in steps] == [-1, -2]


@needs_data
@pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.float32), np.zeros(5, np.int16), [[1.0]]])
def test_samples_of_the_wrong_kind_are_refused(wrong):
    with edgeinfer.load(MODELS / SILERO[0], threads=1) as model:
        with pytest.raises(InputError, match="Expected samples as a float array in one dimension, got"):
            model.stream().feed(wrong)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float64", "int64", "complex64"])
def test_a_frame_of_the_wrong_type_is_refused_at_every_step(tmp_path, dtype, steps):
    one = np.ones((1, 4), np.float32)
    with edgeinfer.load(running_sum(tmp_path / "m.onnx")) as model:
        stream = model.stream()
        for _ in range(steps):
            stream.feed(one)
        with pytest.raises(InputError, match=f"'x': expected type float32, got {dtype}"):
            stream.feed(one.astype(dtype))
        np.testing.assert_array_equal(stream.feed(one)[0].outputs["y"], (steps + 1) * one)  # kept


def test_a_stream_ends_with_its_model(tmp_path):
    one = np.ones((1, 4), np.float32)
    with edgeinfer.load(running_sum(tmp_path / "m.onnx")) as model:
        stream = model.stream()
        for _ in range(3):
            stream.feed(one)
    with pytest.raises(EngineError, match="The model is closed"):
        stream.feed(one)


def test_nan_passes_through(tmp_path):
    with edgeinfer.load(running_sum(tmp_path / "m.onnx")) as model:
        stream = model.stream()
        stream.feed(np.array([[1, np.nan, 2, 3]], np.float32))
        after = stream.feed(np.ones((1, 4), np.float32))[0].outputs["y"]
    np.testing.assert_array_equal(after, [[2, np.nan, 3, 4]])


def test_outputs_may_change_their_size_from_step_to_step(tmp_path):
    """Where something is found, and how often, depends on the frame; the state goes on all the same."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Add", ["x", "h"], ["hn"]),
    ]
    ports = [("x", np.float32, [4]), ("h", np.float32, [4])]
    path = save(tmp_path / "m.onnx", nodes, ports, [("places", np.int64, [1, "n"]), ("hn", np.float32, [4])])
    frames = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    with edgeinfer.load(path) as model:
        stream = model.stream()
        for frame in frames:
            found = stream.feed(frame)[0].outputs["places"]
            np.testing.assert_array_equal(found[0], np.flatnonzero(frame))
        stream.reset()
        assert stream.feed(frames[1])[0].outputs["places"].tolist() == [[1, 3]]


def test_state_may_grow(tmp_path):
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["present"], axis=1),
        helper.make_node("ReduceSum", ["present"], ["y"]),
    ]
    ports = [("past", np.float32, [1, "before"]), ("x", np.float32, [1, 2])]
    path = save(
        tmp_path / "m.onnx", nodes, ports, [("present", np.float32, [1, "after"]), ("y", np.float32, [1, 1])]
    )
    with edgeinfer.load(path) as model:
        stream = model.stream()
        sums = [
            stream.feed(np.full((1, 2), value, np.float32))[0].outputs["y"].item() for value in (1, 2, 3, 4)
        ]
    assert sums == [2, 6, 12, 20]


def test_what_a_step_gave_stays_as_it_was(tmp_path):
    """Results are not views of what the next step writes, nor of what it was fed."""
    with edgeinfer.load(running_sum(tmp_path / "m.onnx")) as model:
        stream, frame = model.stream(), np.ones((1, 4), np.float32)
        outputs = [stream.feed(frame)[0].outputs["y"] for _ in range(4)]
        frame[:] = 100
    assert [float(output[0, 0]) for output in outputs] == [1, 2, 3, 4]
