"""The STFT of HiFT against torch's, for rows that end within the batch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxspec.acoustic.stft import istft, stft

LENGTH = jnp.array([60, 24, 12])
SIZES = pytest.mark.parametrize(("n_fft", "hop"), [(16, 4), (8, 2)])


def windows(n_fft, hop):
    return {"n_fft": n_fft, "hop_length": hop, "win_length": n_fft, "window": torch.hann_window(n_fft)}


@SIZES
def test_stft_of_each_row_is_torchs(n_fft, hop):
    wave = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32)
    for row, made, length in zip(wave, stft(wave, LENGTH, n_fft, hop), LENGTH.tolist(), strict=True):
        spectrum = torch.stft(torch.tensor(row[:length]), **windows(n_fft, hop), return_complex=True).numpy().T
        frames = length // hop + 1
        np.testing.assert_allclose(made[:frames], np.concatenate([spectrum.real, spectrum.imag], axis=1), atol=2e-6)


@SIZES
def test_istft_of_each_row_is_torchs(n_fft, hop):
    rng = np.random.default_rng(0)
    magnitude, phase = rng.uniform(0.1, 2, (2, 3, 60 // hop + 1, n_fft // 2 + 1)).astype(np.float32)
    made = istft(jnp.asarray(magnitude), jnp.asarray(phase), LENGTH // hop + 1, hop)
    assert made.shape == (3, 60)
    for row, length, size, angle in zip(made, LENGTH.tolist(), magnitude, phase, strict=True):
        frames = length // hop + 1
        spectrum = torch.polar(torch.tensor(size[:frames].T), torch.tensor(angle[:frames].T))
        np.testing.assert_allclose(row[:length], torch.istft(spectrum, **windows(n_fft, hop)), atol=2e-6)


def test_one_is_the_inverse_of_the_other():
    wave = np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32)
    real, imaginary = np.split(np.asarray(stft(wave, LENGTH[:2], 16, 4)), 2, axis=-1)
    made = istft(jnp.hypot(real, imaginary), jnp.arctan2(imaginary, real), LENGTH[:2] // 4 + 1, 4)
    np.testing.assert_allclose(made[0], wave[0], atol=1e-5)
    np.testing.assert_allclose(made[1, :24], wave[1, :24], atol=1e-5)
