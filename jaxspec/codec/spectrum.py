"""Short-time Fourier transforms and mel spectra on [B N] waves, in pure JAX.

A wave of N samples has N / hop frames; frame t is centred on sample (t + 1/2) hop, so T frames give back T hop samples.
"""

import functools

import jax.numpy as jnp
import numpy as np

from jaxspec.types import Array


def hann(n_fft: int) -> Array:
    """The periodic Hann window, float32 [n_fft]."""
    return 0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(n_fft) / n_fft)


def _frames(wave: Array, n_fft: int, hop: int) -> Array:
    side = (n_fft - hop) // 2
    padded = jnp.pad(wave, ((0, 0), (side, n_fft - hop - side)))
    hops = padded.reshape(wave.shape[0], -1, hop)
    count = wave.shape[1] // hop
    return jnp.concatenate([hops[:, i : i + count] for i in range(n_fft // hop)], axis=-1)


def stft(wave: Array, n_fft: int, hop: int) -> Array:
    """Wave [B N] -> complex64 [B N/hop n_fft/2+1]; N and n_fft are multiples of hop."""
    return jnp.fft.rfft(_frames(wave, n_fft, hop) * hann(n_fft))


def magnitude(wave: Array, n_fft: int, hop: int) -> Array:
    """|STFT|, with a finite gradient at silence."""
    spectrum = stft(wave, n_fft, hop)
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


def istft(spectrum: Array, n_fft: int, hop: int) -> Array:
    """Complex [B T n_fft/2+1] -> wave [B T hop]: windowed overlap-add, divided by the sum of the squared windows."""
    frames = jnp.fft.irfft(spectrum, n_fft) * hann(n_fft)
    count, side = spectrum.shape[1], (n_fft - hop) // 2
    envelope = _overlap_add(jnp.broadcast_to(hann(n_fft) ** 2, (1, count, n_fft)), hop)
    wave = _overlap_add(frames, hop) / jnp.maximum(envelope, 1e-11)
    return wave[:, side : side + count * hop]


def _overlap_add(frames: Array, hop: int) -> Array:
    batch, count, n_fft = frames.shape
    parts = frames.reshape(batch, count, n_fft // hop, hop)
    last = n_fft // hop - 1
    shifted = [jnp.pad(parts[:, :, i], ((0, 0), (i, last - i), (0, 0))) for i in range(last + 1)]
    return sum(shifted).reshape(batch, -1)


@functools.lru_cache
def _mel_matrix(sample_rate_hz: int, n_fft: int, bins: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=sample_rate_hz, n_fft=n_fft, n_mels=bins).T


def log_mel(wave: Array, sample_rate_hz: int, n_fft: int, hop: int, bins: int) -> Array:
    """Wave [B N] -> natural log of the mel magnitude, floored at 1e-4, float32 [B N/hop bins]."""
    mel = magnitude(wave, n_fft, hop) @ _mel_matrix(sample_rate_hz, n_fft, bins)
    return jnp.log(jnp.maximum(mel, 1e-4))
