"""Mel spectrograms of prompts: Whisper's logarithmic one at 16 kHz and that of CosyVoice's flow at 24 kHz."""

import functools

import numpy as np

WHISPER_RATE_HZ, PROMPT_RATE_HZ = 16_000, 24_000
_WHISPER = 400, 160, 128  # samples under a window, samples between frames, mel bins
_PROMPT = 1920, 480, 80


def whisper(wave: np.ndarray) -> np.ndarray:
    """Whisper's log mel spectrogram, as the S3 tokenizers read it (arXiv 2212.04356).

    (max(log10 max(power, 1e-10), its maximum - 8) + 4) / 4, the maximum over the whole wave.

    Args:
        wave: float32 [N] at 16 kHz, N at least 201.

    Returns:
        float32 [N // 160 128].
    """
    n_fft, hop, bins = _WHISPER
    power = np.abs(_spectrum(wave, n_fft, hop, n_fft // 2)[: len(wave) // hop]) ** 2
    log = np.log10(np.maximum(power @ _filters(WHISPER_RATE_HZ, n_fft, bins, WHISPER_RATE_HZ / 2), 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


def prompt(wave: np.ndarray, fmax_hz: float) -> np.ndarray:
    """The mel spectrogram of a prompt as the flow continues it: ln max(magnitude, 1e-5).

    Args:
        wave: float32 [N] at 24 kHz, N at least 721.
        fmax_hz: the highest frequency; 8000 for CosyVoice 2, 12000 for CosyVoice 3.

    Returns:
        float32 [N // 480 80].
    """
    n_fft, hop, bins = _PROMPT
    spectrum = _spectrum(wave, n_fft, hop, (n_fft - hop) // 2)
    magnitude = np.sqrt(np.abs(spectrum) ** 2 + np.float32(1e-9))
    return np.log(np.maximum(magnitude @ _filters(PROMPT_RATE_HZ, n_fft, bins, fmax_hz), np.float32(1e-5)))


def _spectrum(wave: np.ndarray, n_fft: int, hop: int, side: int) -> np.ndarray:
    """The Fourier transform of each window of a wave reflected at its ends: complex64 [T n_fft/2+1]."""
    padded = np.pad(np.asarray(wave, np.float32), side, mode="reflect")
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop] * window[None])


@functools.lru_cache(8)
def _filters(rate_hz: int, n_fft: int, bins: int, fmax_hz: float) -> np.ndarray:
    """Slaney's triangles of equal area, float32 [n_fft/2+1 bins]."""
    import librosa

    return librosa.filters.mel(sr=rate_hz, n_fft=n_fft, n_mels=bins, fmax=fmax_hz).T
