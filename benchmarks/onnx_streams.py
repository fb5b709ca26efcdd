"""Streams against a bare ONNX Runtime loop over the same sound, in turn, in one process.

    python -m benchmarks.onnx_streams DATA [--rounds N] [--cpu]

DATA holds onnx/ and audio/. Both sides compute the same steps on one thread and keep what they find; the real-time
factor is seconds of computing a second of sound, and the ratio is that of the medians. --cpu: count the computing
thread's own time, on a machine that is shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edgeinfer.engines.onnx import open_onnx
from edgeinfer.inputs.sound import read_wav
from edgeinfer.streams.model_stream import ModelStream

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


def compare(data: Path, name: str, rounds: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(real-time factor of edgeinfer, of the bare loop), medians of `rounds`."""
    recording, bare = CASES[name]
    with open(data / "audio" / recording, "rb") as file:
        sound, _ = read_wav(file, recording)
    session = bare_session(data / "onnx" / name)
    with open_onnx(data / "onnx" / name, threads=1) as model:
        stream = ModelStream(model)
        pieces = [sound[start : start + 512] for start in range(0, len(sound), 512)]
        ours, theirs = [], []
        for _ in range(rounds):
            stream.reset()
            start = clock()
            found = list(stream.over(pieces))
            stream.take_sound()
            assert len(found) >= len(sound) // 512
            ours.append(clock() - start)
            start = clock()
            bare(session, sound)
            theirs.append(clock() - start)
    seconds = len(sound) / RATE
    return statistics.median(ours) / seconds, statistics.median(theirs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu else time.perf_counter
    for name in CASES:
        ours, theirs = compare(arguments.data, name, arguments.rounds, clock)
        print(f"{name:<20} edgeinfer {ours:.4f}, bare loop {theirs:.4f}, ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
