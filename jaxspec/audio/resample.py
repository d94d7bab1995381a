"""Changes the sample rate of a wave as ``torchaudio.transforms.Resample`` does by default: by a windowed sinc, in phases."""

import functools
import math

import numpy as np

_ZEROS = 6  # zero crossings of the sinc on each side
_ROLLOFF = 0.99  # of the lower of the two Nyquist frequencies


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """A wave at another sample rate.

    With o and n the rates without their common divisor, b = 0.99 min(o, n), and t = b (i / o - j / n), output q n + j is the sum
    of samples q o + i times b / o sinc(t) cos^2(pi t / 12) over the i for which t is in (-6, 6).

    Args:
        wave: float32 [N] at ``from_hz``.
        from_hz: its sample rate.
        to_hz: the rate that is wanted.

    Returns:
        float32 [ceil(N to_hz / from_hz)].
    """
    if from_hz == to_hz:
        return wave
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    kernels, starts, width = _phases(old, new)
    blocks = -(-len(wave) // old)  # of old samples each
    padded = np.pad(np.asarray(wave, np.float32), (width, blocks * old - len(wave) + old + width))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])
    made = np.empty((blocks, new), np.float32)
    for phase, start in enumerate(starts):
        made[:, phase] = windows[start : start + blocks * old : old] @ kernels[phase]
    return made.reshape(-1)[: -(-len(wave) * new // old)]


class Resampler:
    """``resample`` for a wave that comes in parts: joined, what ``add`` and ``end`` return is the whole, resampled."""

    def __init__(self, from_hz: int, to_hz: int):
        self._rates = from_hz, to_hz
        divisor = math.gcd(from_hz, to_hz)
        self._old, self._new = from_hz // divisor, to_hz // divisor
        width = _phases(self._old, self._new)[2] if from_hz != to_hz else 0
        self._blocks = -(-width // self._old)  # of old samples, that a block depends on before it and after it
        self._kept, self._before = np.zeros(0, np.float32), 0  # samples from some blocks before the next one on, and how many

    def add(self, wave: np.ndarray) -> np.ndarray:
        """The samples that no later part changes."""
        self._kept = np.concatenate([self._kept, wave])
        ready = max(len(self._kept) // self._old - 1 - self._blocks, self._before)
        made = resample(self._kept, *self._rates)[self._before * self._new : ready * self._new]
        drop = max(ready - self._blocks, 0)
        self._kept, self._before = self._kept[drop * self._old :], ready - drop
        return made

    def end(self) -> np.ndarray:
        """The rest."""
        return resample(self._kept, *self._rates)[self._before * self._new :]


@functools.lru_cache(8)
def _phases(old: int, new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The taps of each phase, float32 [new taps], the sample of a padded block that each begins at, and the padding."""
    base = min(old, new) * _ROLLOFF
    width = math.ceil(_ZEROS * old / base)
    phase = np.arange(new)
    starts = phase * old // new
    taps = np.arange(-width, width + 2)
    shift = (-phase.astype(np.float32) / np.float32(new)).astype(np.float64)  # torchaudio rounds it, and nothing else
    t = np.clip((shift[:, None] + (starts[:, None] + taps[None]) / old) * base, -_ZEROS, _ZEROS)
    return (np.sinc(t) * np.cos(np.pi * t / _ZEROS / 2) ** 2 * (base / old)).astype(np.float32), starts, width
