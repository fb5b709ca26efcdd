"""Sound in pieces of any length: the same frames, and the same sound again."""

import numpy as np
import pytest
import torch

from edgeinfer.streams.framing import SampleFrames, SpectrumFrames


def cuts(length, seed):
    """Random pieces of a sound, empty ones too."""
    places = np.sort(np.random.default_rng(seed).integers(0, length + 1, 9))
    return zip([0, *places], [*places, length])


def noise(length, seed=0):
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 513, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_spectra_give_the_sound_back(length, seed):
    sound = noise(length)
    frames = SpectrumFrames(512, "BFTC")
    made = []
    for start, end in cuts(length, seed):
        made.append(frames.restore(frames.push(sound[start:end])))
        assert sum(map(len, made)) <= end
    made.append(frames.restore(frames.finish()))
    whole = np.concatenate(made)
    assert len(whole) >= length
    np.testing.assert_allclose(whole[:length], sound, atol=1e-6)


@pytest.mark.parametrize("layout", ["BFTC", "BTFC", "BCFT"])
def test_spectra_equal_those_of_torch(layout):
    sound = noise(4000)
    frames = SpectrumFrames(512, layout)
    made = frames.push(sound[:1000]) + frames.push(sound[1000:]) + frames.finish()
    window = torch.hann_window(512).sqrt()
    expected = torch.view_as_real(
        torch.stft(torch.from_numpy(sound), 512, 256, 512, window, center=True, return_complex=True)
    )
    order = ["FTC".index(letter) for letter in layout if letter != "B"]
    axis = layout.replace("B", "").index("T")
    steps = expected.shape[1]
    assert steps <= len(made) <= steps + 1
    for step in range(steps):
        wanted = expected[:, step : step + 1].permute(order).numpy()
        found = made[step].squeeze(layout.index("B"))
        assert found.shape[axis] == 1
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_windows_follow_each_other_behind_their_context(seed):
    sound = noise(3000)
    frames = SampleFrames(512, 64)
    made = []
    for start, end in cuts(len(sound), seed):
        made += frames.push(sound[start:end])
    assert len(made) == 3000 // 512
    made += frames.finish()
    padded = np.concatenate([np.zeros(64, np.float32), sound, np.zeros(600, np.float32)])
    assert len(made) == 6
    for step, frame in enumerate(made):
        np.testing.assert_array_equal(frame, padded[None, step * 512 : step * 512 + 576])
    assert frames.finish() == [] and frames.pending == 0
