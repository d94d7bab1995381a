"""Short-time Fourier transforms and mel spectrograms of waves [B N], in pure JAX.

A wave of N samples has N / hop frames. Frame t is centred on sample (t + 1/2) hop, so T frames give T hop samples. A spectrum is
its real parts, and its imaginary parts after them. Transforms are products with matrices: a TPU has no fast one, and on a CPU two
FFTs at once may wait for each other for ever (XLA of jaxlib 0.11).
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


@functools.lru_cache
def analysis(n_fft: int) -> np.ndarray:
    """float32 [n_fft n_fft+2]: the window, then real parts and imaginary parts."""
    spectrum = np.fft.rfft(np.diag(hann(n_fft)))
    return np.concatenate([spectrum.real, spectrum.imag], axis=1).astype(np.float32)


@functools.lru_cache
def synthesis(n_fft: int) -> np.ndarray:
    """float32 [n_fft+2 n_fft]: the inverse from real parts and imaginary parts, then the window."""
    unit = np.eye(n_fft // 2 + 1)
    return (np.concatenate([np.fft.irfft(unit), np.fft.irfft(1j * unit)]) * hann(n_fft)).astype(np.float32)


def product(rows: Array, matrix: np.ndarray) -> Array:
    """Rows [... M] times a matrix [M N] in float32, also where a device's default is less."""
    return jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)


def stft(wave: Array, n_fft: int, hop: int) -> Array:
    """The windowed Fourier transform of each frame.

    Args:
        wave: float32 [B N], N a multiple of ``hop``.
        n_fft: samples under the window, a multiple of ``hop``.
        hop: samples between frames.

    Returns:
        float32 [B N/hop n_fft+2].
    """
    return product(_frames(wave, n_fft, hop), analysis(n_fft))


def magnitude(wave: Array, n_fft: int, hop: int) -> Array:
    """The magnitude of ``stft``, float32 [B N/hop n_fft/2+1], with a finite gradient at silence."""
    real, imaginary = jnp.split(stft(wave, n_fft, hop), 2, axis=-1)
    return jnp.sqrt(real**2 + imaginary**2 + 1e-9)


def log_mel(wave: Array, sample_rate_hz: int, n_fft: int, hop: int, bins: int) -> Array:
    """The natural logarithm of the mel spectrogram's magnitude, floored at 1e-4: wave [B N] -> float32 [B N/hop bins]."""
    mel = product(magnitude(wave, n_fft, hop), _mel_matrix(sample_rate_hz, n_fft, bins))
    return jnp.log(jnp.maximum(mel, 1e-4))


def polar(magnitude: Array, phase: Array) -> Array:
    """The spectrum [... 2F] of a magnitude and a phase in radians [... F].

    >>> polar(jnp.ones(2), jnp.zeros(2)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], axis=-1)


def istft(spectrum: Array, mask: Array, n_fft: int, hop: int) -> Array:
    """The inverse of ``stft``: windowed overlap-add, divided by the sum of the squared windows.

    Args:
        spectrum: float32 [B T n_fft+2].
        mask: bool [B T], which frames are valid. The others add nothing to the wave nor to the sum of windows, and their own
            samples are 0, so that valid frames give the same samples whatever pads them.
        n_fft: samples under the window, a multiple of ``hop``.
        hop: samples between frames.

    Returns:
        The wave, float32 [B T*hop].
    """
    valid = mask[:, :, None]
    frames = jnp.where(valid, product(spectrum, synthesis(n_fft)), 0)
    envelope = overlap_add(jnp.where(valid, np.square(hann(n_fft))[None, None], 0), hop)
    wave = overlap_add(frames, hop) / jnp.maximum(envelope, 1e-11)
    side = (n_fft - hop) // 2
    return jnp.where(jnp.repeat(mask, hop, axis=1), wave[:, side : side + mask.shape[1] * hop], 0)


def _frames(wave: Array, n_fft: int, hop: int) -> Array:
    side = (n_fft - hop) // 2
    padded = jnp.pad(wave, ((0, 0), (side, n_fft - hop - side)))
    hops = padded.reshape(wave.shape[0], -1, hop)
    count = wave.shape[1] // hop
    return jnp.concatenate([hops[:, i : i + count] for i in range(n_fft // hop)], axis=-1)


def overlap_add(frames: Array, hop: int) -> Array:
    """The sum of frames that begin ``hop`` samples apart, n_fft a multiple of it: [B T n_fft] -> [B (T-1)*hop+n_fft]."""
    batch, count, n_fft = frames.shape
    parts = frames.reshape(batch, count, n_fft // hop, hop)
    last = n_fft // hop - 1
    shifted = [jnp.pad(parts[:, :, i], ((0, 0), (i, last - i), (0, 0))) for i in range(last + 1)]
    return functools.reduce(jnp.add, shifted).reshape(batch, -1)


@functools.lru_cache
def _mel_matrix(sample_rate_hz: int, n_fft: int, bins: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=sample_rate_hz, n_fft=n_fft, n_mels=bins).T
