"""The quantiser, the spectra and the codec."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from jaxspec.codec import fsq, spectrum
from jaxspec.codec.builtin import Config, VoiceCodec, codec

LEVELS = [(7, 5, 5, 5, 5), (4, 4, 4), (8, 5, 2)]


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_number_every_grid_point_once(levels):
    codes = jnp.arange(fsq.codebook_size(levels))
    digits = fsq.to_digits(codes, levels)
    assert jnp.unique(digits, axis=0).shape == digits.shape
    np.testing.assert_array_equal(fsq.to_codes(digits, levels), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_quantising_gives_the_vector_of_its_code(levels):
    z = 3 * jax.random.normal(jax.random.key(0), (500, len(levels)))
    quantised, digits = fsq.quantize(z, levels)
    np.testing.assert_allclose(fsq.vectors(fsq.to_codes(digits, levels), levels), quantised, atol=1e-6)
    step = 2 / (jnp.array(levels) - 1)
    assert (jnp.abs(jnp.tanh(z) - quantised) <= step[None] / 2 + 1e-6).all()


def test_gradients_pass_the_quantiser():
    z = jnp.array([[0.3, -2.0, 0.0]])
    through = jax.grad(lambda z: fsq.quantize(z, (4, 5, 8))[0].sum())(z)
    np.testing.assert_allclose(through, 1 - jnp.tanh(z) ** 2, rtol=1e-5)


def test_istft_inverts_stft():
    wave = jax.random.normal(jax.random.key(1), (2, 3200))
    again = spectrum.istft(spectrum.stft(wave, 640, 160), jnp.ones((2, 20), bool), 640, 160)
    np.testing.assert_allclose(again[:, 320:-320], wave[:, 320:-320], atol=1e-5)


def test_stft_is_librosas():
    wave = np.random.default_rng(0).normal(size=3200).astype(np.float32)
    ours = spectrum.stft(jnp.asarray(wave)[None], 640, 160)[0]
    theirs = librosa.stft(np.pad(wave, 240), n_fft=640, hop_length=160, center=False).T
    np.testing.assert_allclose(ours, np.concatenate([theirs.real, theirs.imag], axis=1), atol=1e-4)


def test_the_gradient_of_silence_is_finite():
    gradient = jax.grad(lambda wave: spectrum.log_mel(wave, 16_000, 640, 160, 80).sum())(jnp.zeros((1, 1600)))
    assert jnp.isfinite(gradient).all()


def test_codec_gives_a_code_every_40_ms_and_as_many_samples_back():
    config = Config(voices=2, encoder_width=8, width=16, coarse_blocks=1, fine_blocks=1)
    wave = jax.random.normal(jax.random.key(0), (2, 12 * 640))
    params = VoiceCodec(config).init(jax.random.key(1), wave, jnp.zeros(2, jnp.int32))["params"]
    made, length = codec(config), jnp.array([12 * 640, 12 * 640])
    assert (made.sample_rate_hz, made.frame_rate_hz) == (16_000, 25)
    codes = made.encode(params, wave, length)
    assert codes.shape == (2, 12, 1)
    assert codes.dtype == jnp.int32
    assert (codes >= 0).all()
    assert (codes < 4375).all()
    first, second = (made.decode(params, codes, jnp.array([12, 12]), jnp.array([voice, 0]), None) for voice in (0, 1))
    assert first.shape == wave.shape
    assert not jnp.allclose(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])  # a voice is of its own row
    assert codec(config) is made
