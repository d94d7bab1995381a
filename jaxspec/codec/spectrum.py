"""Short-time Fourier transforms and mel spectrograms of waves [B N], in pure JAX.

A wave of N samples has N / hop frames. Frame t is centred on sample (t + 1/2) hop, so T frames give T hop samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.types import Array


def hann(n_fft: int) -> np.ndarray:
    """The periodic Hann window, float32 [n_fft].

    >>> hann(4).tolist()
    [0.0, 0.5, 1.0, 0.5]
    """
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def stft(wave: Array, n_fft: int, hop: int) -> Array:
    """The windowed Fourier transform of each frame.

    Args:
        wave: float32 [B N], N a multiple of ``hop``.
        n_fft: samples under the window, a multiple of ``hop``.
        hop: samples between frames.

    Returns:
        complex64 [B N/hop n_fft/2+1].
    """
    return jnp.fft.rfft(_frames(wave, n_fft, hop) * hann(n_fft)[None, None])


def magnitude(wave: Array, n_fft: int, hop: int) -> Array:
    """The magnitude of ``stft``, float32 [B N/hop n_fft/2+1], with a finite gradient at silence."""
    spectrum = stft(wave, n_fft, hop)
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


def log_mel(wave: Array, sample_rate_hz: int, n_fft: int, hop: int, bins: int) -> Array:
    """The natural logarithm of the mel spectrogram's magnitude, floored at 1e-4: wave [B N] -> float32 [B N/hop bins]."""
    mel = magnitude(wave, n_fft, hop) @ _mel_matrix(sample_rate_hz, n_fft, bins)
    return jnp.log(jnp.maximum(mel, 1e-4))


def polar(magnitude: Array, phase: Array) -> Array:
    """Complex numbers of a magnitude and a phase in radians.

    >>> polar(jnp.float32(2), jnp.float32(0))
    Array(2.+0.j, dtype=complex64)
    """
    return jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))


def istft(spectrum: Array, mask: Array, n_fft: int, hop: int) -> Array:
    """The inverse of ``stft``: windowed overlap-add, divided by the sum of the squared windows.

    Args:
        spectrum: complex64 [B T n_fft/2+1].
        mask: bool [B T], which frames are valid. The others add nothing to the wave nor to the sum of windows, and their own
            samples are 0, so that valid frames give the same samples whatever pads them.
        n_fft: samples under the window, a multiple of ``hop``.
        hop: samples between frames.

    Returns:
        The wave, float32 [B T*hop].
    """
    window, valid = hann(n_fft)[None, None], mask[:, :, None]
    frames = jnp.where(valid, jnp.fft.irfft(spectrum, n_fft) * window, 0)
    envelope = _overlap_add(jnp.where(valid, window**2, 0), hop)
    wave = _overlap_add(frames, hop) / jnp.maximum(envelope, 1e-11)
    side = (n_fft - hop) // 2
    return jnp.where(jnp.repeat(mask, hop, axis=1), wave[:, side : side + mask.shape[1] * hop], 0)


def _frames(wave: Array, n_fft: int, hop: int) -> Array:
    side = (n_fft - hop) // 2
    padded = jnp.pad(wave, ((0, 0), (side, n_fft - hop - side)))
    hops = padded.reshape(wave.shape[0], -1, hop)
    count = wave.shape[1] // hop
    return jnp.concatenate([hops[:, i : i + count] for i in range(n_fft // hop)], axis=-1)


def _overlap_add(frames: Array, hop: int) -> Array:
    batch, count, n_fft = frames.shape
    parts = frames.reshape(batch, count, n_fft // hop, hop)
    last = n_fft // hop - 1
    shifted = [jnp.pad(parts[:, :, i], ((0, 0), (i, last - i), (0, 0))) for i in range(last + 1)]
    return functools.reduce(jnp.add, shifted).reshape(batch, -1)


@functools.lru_cache
def _mel_matrix(sample_rate_hz: int, n_fft: int, bins: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=sample_rate_hz, n_fft=n_fft, n_mels=bins).T
