"""Samples in pieces of any length -> the input of each step of a model, and spectra -> samples again."""

from __future__ import annotations

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.forms.form import Framing


def at_rate(framing: Framing, rate: int) -> tuple[int, int, int]:
    """(window, hop, context) in samples at `rate`. Raises InputError for a rate that the model does not
    take."""
    if rate == framing.rate:
        return framing.window, framing.hop, framing.context
    other = framing.rates.get(str(rate))
    if other is None:
        rates = ", ".join(f"{known:,}" for known in sorted({framing.rate, *map(int, framing.rates)}))
        raise InputError(f"The model takes {rates} samples a second, not {rate:,}.")
    return other["window"], other["hop"], other.get("context", 0)


class SampleFrames:
    """Windows that follow each other, each behind the last `context` samples of before: arrays [1, context +
    window]."""

    def __init__(self, window: int, context: int):
        self.hop = self._window = window
        self._context = context
        self.reset()

    def reset(self) -> None:
        self._held = np.zeros(self._context, np.float32)

    @property
    def pending(self) -> int:
        """Samples that wait for the rest of their window."""
        return len(self._held) - self._context

    def push(self, samples: np.ndarray) -> list[np.ndarray]:
        """The inputs that `samples` complete."""
        held = np.concatenate([self._held, samples])
        steps = (len(held) - self._context) // self._window
        size = self._context + self._window
        starts = range(0, steps * self._window, self._window)
        frames = [held[start : start + size].reshape(1, size) for start in starts]
        self._held = held[steps * self._window :]
        return frames

    def finish(self) -> list[np.ndarray]:
        """The last window, filled with silence, where samples are left."""
        frames = self.push(np.zeros(self._window - self.pending, np.float32)) if self.pending else []
        self.reset()
        return frames


class SpectrumFrames:
    """Fourier transforms of windows that overlap by half, under the square root of a Hann window.

    As torch.stft with center=True: the first and last half window see the sound mirrored at its ends.
    `restore` puts the model's spectra together again (overlap and add); its samples lag one hop behind.
    """

    def __init__(self, window: int, layout: str):
        self.hop = window // 2
        self._window = window
        angle = 2 * np.pi * np.arange(window) / window
        self._hann = np.sqrt(0.5 - 0.5 * np.cos(angle))
        self._layout = layout
        self.reset()

    def reset(self) -> None:
        self._held: np.ndarray | None = None  # None: the mirrored start is not there yet
        self._start = np.zeros(0)
        self._recent = np.zeros(0)  # enough to mirror the end
        self._overlap: np.ndarray | None = None

    @property
    def pending(self) -> int:
        return len(self._start) if self._held is None else len(self._held) - self.hop

    def push(self, samples: np.ndarray) -> list[np.ndarray]:
        """Inputs in the form's layout, one a hop."""
        samples = samples.astype(np.float64)
        self._recent = np.concatenate([self._recent, samples])[-self.hop - 1 :]
        if self._held is None:
            self._start = np.concatenate([self._start, samples])
            if len(self._start) <= self.hop:
                return []
            samples, self._held = self._start, self._start[self.hop : 0 : -1]
            self._start = np.zeros(0)
        self._held = np.concatenate([self._held, samples])
        steps = max(0, (len(self._held) - self._window) // self.hop + 1)
        if not steps:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(self._held, self._window)[:: self.hop][:steps]
        spectra = np.fft.rfft(windows * self._hann, axis=1)
        self._held = self._held[steps * self.hop :]
        return self._arrange(spectra)

    def finish(self) -> list[np.ndarray]:
        """What is left, mirrored at the end, and as much silence as completes every sample."""
        if not len(self._recent):
            return []
        mirrored = self._recent[-2::-1][: self.hop]
        if self._held is None:  # shorter than what is mirrored
            start, self._held = self._start, np.zeros(self.hop)
            self._held[self.hop - max(0, len(start) - 1) :] = start[:0:-1]
            self._start = np.zeros(0)
            frames = self.push(start)
        else:
            frames = []
        silence = np.zeros(2 * self._window - len(mirrored))
        wanted = -(-self.pending // self.hop) + 1  # a hop is whole when the step behind it is there
        return frames + self.push(np.concatenate([mirrored, silence]))[:wanted]

    def _arrange(self, spectra: np.ndarray) -> list[np.ndarray]:
        parts = np.stack([spectra.real, spectra.imag], axis=-1).astype(np.float32)  # T F C
        order = ["TFC".index(letter) for letter in self._layout if letter != "B"]
        batch = self._layout.index("B")
        return [
            np.ascontiguousarray(np.expand_dims(parts[step : step + 1].transpose(order), batch))
            for step in range(len(parts))
        ]

    def restore(self, frames: list[np.ndarray]) -> np.ndarray:
        """Samples, a hop for each spectrum but the first one of a sound."""
        if not frames:
            return np.zeros(0, np.float32)
        batch = self._layout.index("B")
        axes = [self._layout.replace("B", "").index(letter) for letter in "TFC"]
        parts = np.concatenate([frame.squeeze(batch).transpose(axes) for frame in frames]).astype(np.float64)
        windows = np.fft.irfft(parts[..., 0] + 1j * parts[..., 1], self._window, axis=1) * self._hann
        first = self._overlap is None
        tails = np.concatenate(
            [np.zeros((1, self.hop)) if first else self._overlap[None], windows[:, self.hop :]]
        )
        self._overlap = tails[-1]
        samples = (windows[:, : self.hop] + tails[:-1]).ravel().astype(np.float32)
        return samples[self.hop :] if first else samples


def make_frames(framing: Framing, rate: int) -> SampleFrames | SpectrumFrames:
    """Raises InputError for a rate that the model does not take."""
    window, _, context = at_rate(framing, rate)
    return (
        SpectrumFrames(window, framing.layout)
        if framing.kind == "spectrum"
        else SampleFrames(window, context)
    )
