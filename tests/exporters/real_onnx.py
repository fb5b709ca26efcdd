"""The real ONNX models, inputs for them from the real sounds and pictures, and how much two models differ there."""

import os
import wave
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image, ImageDraw

DATA = os.environ.get("EDGEINFER_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="EDGEINFER_TEST_DATA (real models) is not set")
FOLDER = Path(DATA or "")
MODELS = {
    name: FOLDER / "onnx" / path
    for name, path in {
        "silero": "silero_vad.onnx",
        "silero_16k": "silero_vad_16k_op15.onnx",
        "gtcrn": "gtcrn_simple.onnx",
        "detector": "FastestDet.onnx",
        "mobilenet": "mobilenet_v2_int8_B.onnx",
        "beans": "resnet-tiny-beans.onnx",
        "faces": "ultraface-rfb-320.onnx",
        "text": "ppocrv3-det.onnx",
        "magika": "magika/model.onnx",
    }.items()
}
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def picture(name, width, height):
    image = Image.open(FOLDER / "images" / name).convert("RGB").resize((width, height))
    return np.asarray(image).astype(np.float32).transpose(2, 0, 1)


def sound(name):
    with wave.open(str(FOLDER / "audio" / name)) as file:
        data = file.readframes(file.getnframes())
    return np.frombuffer(data, np.int16).astype(np.float32) / 32768


def page(seed=0):
    """A drawn page of text, as the text detector wants it."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 256), (245, 245, 240))
    words = "edge infer streams weights from disk".split()
    for y in range(20, 230, 34):
        line = " ".join(words[i] for i in random.integers(0, 6, 5))
        ImageDraw.Draw(image).text((int(random.integers(10, 60)), y), line, fill=(20, 20, 30))
    pixels = np.asarray(image).astype(np.float32).transpose(2, 0, 1)
    return {"x": ((pixels / 255 - _MEAN) / _DEVIATION)[None].astype(np.float32)}


def bytes_of(path):
    """The first and last 1,024 bytes of a file, as magika wants them."""
    data = path.read_bytes().strip()
    first, last = list(data[:1024]), list(data[-1024:])
    filled = first + [256] * (1024 - len(first)) + [256] * (1024 - len(last)) + last
    return {"bytes": np.array([filled], np.int32)}


def _images(name, size, change, pictures=("dog.jpg", "cat.png")):
    return [{name: change(picture(image, *size))[None].astype(np.float32)} for image in pictures]


def _silero(path, frames=345):
    """The feeds of a run over jfk.wav, state and all."""
    run, samples = session(path), sound("jfk.wav")
    state, context, feeds = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), []
    for i in range(min(frames, len(samples) // 512)):
        heard = np.concatenate([context, samples[i * 512 : (i + 1) * 512]])
        feeds.append({"input": heard[None], "state": state, "sr": np.array(16000, np.int64)})
        context, state = heard[-64:], run.run(None, feeds[-1])[1]
    return feeds


def _gtcrn(path, frames=60):
    run, samples = session(path), sound("gtcrn_mix.wav")
    window = np.hanning(513)[:-1] ** 0.5
    shapes = {"conv_cache": (2, 1, 16, 16, 33), "tra_cache": (2, 3, 1, 1, 16), "inter_cache": (2, 1, 33, 16)}
    caches, feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, []
    for i in range(40, 40 + frames):
        spectrum = np.fft.rfft(samples[i * 256 : i * 256 + 512] * window)
        mix = np.stack([spectrum.real, spectrum.imag], -1)[None, :, None, :].astype(np.float32)
        feeds.append({"mix": mix, **caches})
        caches = dict(zip(shapes, run.run(None, feeds[-1])[1:]))
    return feeds


def feeds_of(name):
    """Real inputs of the model `name`: each sample a dict of arrays."""
    path = MODELS[name]
    makers = {
        "silero": lambda: _silero(path),
        "silero_16k": lambda: _silero(path),
        "gtcrn": lambda: _gtcrn(path),
        "detector": lambda: _images("input.1", (352, 352), lambda x: x[::-1] / 255),
        "mobilenet": lambda: _images("input", (224, 224), lambda x: (x / 255 - _MEAN) / _DEVIATION),
        "beans": lambda: _images("pixel_values", (224, 224), lambda x: x / 127.5 - 1),
        "faces": lambda: _images("input", (320, 240), lambda x: (x - 127) / 128),
        "text": lambda: [page()],
        "magika": lambda: [
            bytes_of(Path(__file__)),
            bytes_of(FOLDER / "audio" / "jfk.wav"),
            bytes_of(FOLDER / "README.md"),
            bytes_of(FOLDER / "images" / "dog.jpg"),
        ],
    }
    return makers[name]()


def outputs(path, feeds):
    """Of every sample, all outputs."""
    run = session(path)
    return [run.run(None, sample) for sample in feeds]


def differences(expected, found):
    """For each output, over all samples: (largest difference / largest value, root mean squares' quotient)."""
    results = []
    for right, wrong in zip(zip(*expected), zip(*found)):
        right = np.concatenate([np.ravel(x).astype(np.float64) for x in right])
        wrong = np.concatenate([np.ravel(x).astype(np.float64) for x in wrong])
        error, scale = np.abs(right - wrong), np.abs(right)
        results.append((error.max() / scale.max(), np.sqrt((error**2).mean() / (scale**2).mean())))
    return results
