"""Kaldi's log mel filter banks at 16 kHz, as CAM++ and w2v-bert read them, of numpy and of jax arrays alike.

25 ms every 10 ms -> minus its mean -> x[t] - 0.97 x[t - 1] -> Povey's window -> power -> 80 mel bins of 20 .. 8000 Hz -> log
"""

import functools
from typing import TypeVar

import jax
import numpy as np

from jaxspec.types import Array

RATE_HZ, BINS = 16_000, 80
WINDOW, HOP = 400, 160  # samples
_PART = 80  # divides both
_N_FFT = 512
_PREEMPHASIS = 0.97
_FLOOR = 1.1920928955078125e-07  # Kaldi's, the epsilon of float32

Wave = TypeVar("Wave", np.ndarray, Array)


def count(samples: int) -> int:
    """The number of frames that lie within so many samples.

    >>> [count(samples) for samples in (399, 400, 559, 560)]
    [0, 1, 1, 2]
    """
    return max(1 + (samples - WINDOW) // HOP, 0)


def fbank(wave: Wave, scale: float = 1.0) -> Wave:
    """The logarithm of the power in each mel bin, without dither; of a numpy array it is computed in float64.

    Args:
        wave: float32 [... N] in [-1, 1] at 16 kHz; its rows are independent. What is returned is an array of the same library.
        scale: of the samples; 32768 for models that were trained on 16-bit integers.

    Returns:
        float32 [... count(N) 80].
    """
    xp, dtype = wave.__array_namespace__(), np.float64 if isinstance(wave, np.ndarray) else np.float32
    total = count(wave.shape[-1])
    parts = (wave[..., : wave.shape[-1] // _PART * _PART].astype(dtype) * dtype(scale)).reshape(*wave.shape[:-1], -1, _PART)
    step, each = HOP // _PART, WINDOW // _PART
    frames = xp.concatenate([parts[..., i : i + step * total : step, :] for i in range(each)], axis=-1)
    frames = frames - frames.mean(axis=-1, keepdims=True)
    before = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    with jax.default_matmul_precision("highest"):
        real, imaginary = ((frames - dtype(_PREEMPHASIS) * before) @ part.astype(dtype) for part in _analysis())
        power = (real**2 + imaginary**2) @ _filters().astype(dtype)
    return xp.log(xp.maximum(power, dtype(_FLOOR))).astype(np.float32)


@functools.cache
def _analysis() -> tuple[np.ndarray, np.ndarray]:
    """Povey's window, a symmetric Hann window to the power of 0.85, and real and imaginary parts, float64 [400 257] each.

    A matrix, as an FFT of XLA's may wait for another one for ever on a CPU (jaxlib 0.11).
    """
    spectrum = np.fft.rfft(np.diag(np.hanning(WINDOW) ** 0.85), _N_FFT)
    return spectrum.real, spectrum.imag


def _mel(hz: np.ndarray) -> np.ndarray:
    return 1127 * np.log(1 + hz / 700)


@functools.cache
def _filters() -> np.ndarray:
    """Triangles that are straight in mel, float64 [257 80]."""
    lowest, highest = _mel(np.array([20.0, RATE_HZ / 2]))
    edges = np.linspace(lowest, highest, BINS + 2)
    low, middle, high = edges[None, :-2], edges[None, 1:-1], edges[None, 2:]
    at = _mel(np.arange(_N_FFT // 2 + 1) * RATE_HZ / _N_FFT)[:, None]
    return np.maximum(np.minimum((at - low) / (middle - low), (high - at) / (high - middle)), 0)
