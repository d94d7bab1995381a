"""Synthesizer similarity: the cosine of two voices' embeddings by resemblyzer's encoder (GE2E, arXiv 1710.10467), on the CPU."""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np

_ENCODER_RATE_HZ = 16_000
_LEVEL = 10 ** (-30 / 20)  # the root mean square that the encoder expects; its spectra are not logarithmic, so the level matters
_SHORTEST = 16_000  # samples; what is shorter is repeated, as the encoder would fill its window with silence


@cache
def _encoder():
    try:
        with warnings.catch_warnings(action="ignore"):  # its own imports of outdated names
            from resemblyzer import VoiceEncoder
    except ImportError as error:
        raise ImportError(f"expected resemblyzer for speaker similarity: pip install 'jaxspec[eval]' ({error})") from error
    return VoiceEncoder("cpu", verbose=False)


def _prepared(wave: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """One wave at the encoder's rate and level, without long silences."""
    from resemblyzer import preprocess_wav

    wave = wave * (_LEVEL / np.sqrt(np.mean(wave**2)))
    trimmed = preprocess_wav(wave, source_sr=sample_rate_hz if sample_rate_hz != _ENCODER_RATE_HZ else None)
    return np.resize(trimmed, max(len(trimmed), _SHORTEST)) if len(trimmed) else wave


def embed(waves: Sequence[np.ndarray], sample_rate_hz: int) -> np.ndarray:
    """The voice of each wave as a vector of length 1.

    Args:
        waves: float32 [N] each, of any level; a second or more of speech says most.
        sample_rate_hz: their rate.

    Returns:
        float32 [len(waves), 256].

    Raises:
        ValueError: for a wave that is not one row of finite samples, or silent.
        ImportError: when resemblyzer is not installed.
    """
    waves = [np.asarray(wave, np.float32) for wave in waves]
    for wave in waves:
        if wave.ndim != 1 or not np.isfinite(wave).all() or not wave.any():
            raise ValueError(f"expected waves [N] of finite samples that are not all 0, but one of shape {wave.shape} is not")
    encoder = _encoder()
    return np.stack([encoder.embed_utterance(_prepared(wave, sample_rate_hz)) for wave in waves]).astype(np.float32)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine between embeddings [... D] and [... D], in -1 .. 1; float32 [...].

    >>> round(float(similarity(np.array([3.0, 4.0]), np.array([4.0, 3.0]))), 2)
    0.96
    """
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (np.sum(a * b, axis=-1) / norms).astype(np.float32)
