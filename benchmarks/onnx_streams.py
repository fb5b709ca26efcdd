"""Streams against a bare ONNX Runtime loop over the same sound, in turn, in one process.

    python -m benchmarks.onnx_streams DATA [--rounds N] [--cpu]

DATA holds onnx/ and audio/. All sides compute the same steps on one thread and keep what they find: the bare loop;
`file`, a whole recording as `edgeinfer stream` reads it, sensing thread and queue included; `api`, the same through
`model.stream().over`; `live`, each piece of 32 ms fed by itself, as a microphone gives it. The real-time factor is seconds
a second of sound, and the ratio is that of the medians. --cpu: count the computing thread's own time, on a machine that is
shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edgeinfer.inputs.sound import read_wav
from edgeinfer.streams.description import StageDescription
from edgeinfer.streams.model_stream import ModelStream
from edgeinfer.streams.pipeline import Pipeline, open_pipeline
from edgeinfer.streams.running import run_pipeline
from edgeinfer.streams.sources import FAST_PIECE_SECONDS, PIECE_SECONDS

RATE = 16000


def bare_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bare_speech(session: onnxruntime.InferenceSession, sound: np.ndarray) -> list[np.ndarray]:
    """Silero VAD as its authors feed it: 512 samples behind the last 64 of before."""
    state, before, rate = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), np.array(RATE)
    found = []
    for start in range(0, len(sound) - 511, 512):
        frame = np.concatenate([before, sound[start : start + 512]])
        before = frame[-64:]
        speech, state = session.run(None, {"input": frame[None], "state": state, "sr": rate})
        found.append(speech)
    return found


def bare_enhancement(session: onnxruntime.InferenceSession, sound: np.ndarray) -> np.ndarray:
    """GTCRN frame by frame, its transforms included."""
    caches = [np.zeros(shape, np.float32) for shape in ((2, 1, 16, 16, 33), (2, 3, 1, 1, 16), (2, 1, 33, 16))]
    window = np.sqrt(np.hanning(513)[:512])
    padded, made = np.pad(sound, 256, mode="reflect"), np.zeros(len(sound) + 512)
    for start in range(0, len(padded) - 511, 256):
        spectrum = np.fft.rfft(padded[start : start + 512] * window)
        mix = np.stack([spectrum.real, spectrum.imag], -1).astype(np.float32)[None, :, None]
        feeds = {"mix": mix, "conv_cache": caches[0], "tra_cache": caches[1], "inter_cache": caches[2]}
        clean, *caches = session.run(None, feeds)
        made[start : start + 512] += np.fft.irfft(clean[0, :, 0, 0] + 1j * clean[0, :, 0, 1]) * window
    return made


CASES = {
    "silero_vad.onnx": ("jfk.wav", bare_speech),
    "gtcrn_simple.onnx": ("gtcrn_mix.wav", bare_enhancement),
}


def cut(sound: np.ndarray, seconds: float) -> list[np.ndarray]:
    size = round(seconds * RATE)
    return [sound[start : start + size] for start in range(0, len(sound), size)]


def through_file(pipeline: Pipeline, stream: ModelStream, sound: np.ndarray) -> int:
    """As the command does with a recording. Gives the number of steps."""
    found = []
    run_pipeline(pipeline, cut(sound, FAST_PIECE_SECONDS), found.extend)
    stream.take_sound()
    return len(found)


def through_api(_pipeline: Pipeline, stream: ModelStream, sound: np.ndarray) -> int:
    found = list(stream.over(cut(sound, PIECE_SECONDS)))
    stream.take_sound()
    return len(found)


def through_feed(_pipeline: Pipeline, stream: ModelStream, sound: np.ndarray) -> int:
    found = []
    for piece in cut(sound, PIECE_SECONDS):
        found += stream.feed(piece)
    found += stream.finish()
    stream.take_sound()
    return len(found)


WAYS = {"file": through_file, "api": through_api, "live": through_feed}


def compare(data: Path, name: str, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The real-time factor of the bare loop ("bare") and of each of `WAYS`, medians of `rounds`."""
    recording, bare = CASES[name]
    with open(data / "audio" / recording, "rb") as file:
        sound, _ = read_wav(file, recording)
    session = bare_session(data / "onnx" / name)
    taken: dict[str, list[float]] = {way: [] for way in ("bare", *WAYS)}
    with open_pipeline([StageDescription(data / "onnx" / name, "model")], threads=1) as pipeline:
        stream = pipeline.streams["model"]
        for _ in range(rounds + 1):  # the first one warms up
            start = clock()
            bare(session, sound)
            taken["bare"].append(clock() - start)
            for way, go in WAYS.items():
                stream.reset()
                start = clock()
                steps = go(pipeline, stream, sound)
                taken[way].append(clock() - start)
                if steps < len(sound) // 512:
                    raise RuntimeError(f"{name}, {way}: {steps} steps are too few")
    seconds = len(sound) / RATE
    return {way: statistics.median(times[1:]) / seconds for way, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu else time.perf_counter
    for name in CASES:
        factors = compare(arguments.data, name, arguments.rounds, clock)
        bare = factors.pop("bare")
        ours = ", ".join(f"{way} {factor:.5f} ({factor / bare:.3f})" for way, factor in factors.items())
        print(f"{name:<20} bare loop {bare:.5f}, {ours}")


if __name__ == "__main__":
    main()
