"""Speaker similarity: the cosine between speaker embeddings of resemblyzer's encoder (GE2E, arXiv 1710.10467), on the CPU."""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np

from jaxspec.evaluate.waves import checked

_ENCODER_RATE_HZ = 16_000
_LEVEL_RMS = 10 ** (-30 / 20)  # what the encoder expects; its spectra are not logarithmic, so the level matters
_MIN_SAMPLES = 16_000  # shorter waves are repeated, because the encoder would pad them with silence


@cache
def _encoder():
    try:
        with warnings.catch_warnings(action="ignore"):  # it imports deprecated names
            from resemblyzer import VoiceEncoder
    except ImportError as error:
        raise ImportError(f"expected resemblyzer to be installed, got {error}: pip install 'jaxspec[eval]'") from error
    return VoiceEncoder("cpu", verbose=False)


def _prepared(wave: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """One wave at the encoder's rate and level, without long silences."""
    from resemblyzer import preprocess_wav

    wave = wave * (_LEVEL_RMS / np.sqrt(np.mean(wave**2)))
    trimmed = preprocess_wav(wave, source_sr=sample_rate_hz if sample_rate_hz != _ENCODER_RATE_HZ else None)
    return np.resize(trimmed, max(len(trimmed), _MIN_SAMPLES)) if len(trimmed) else wave


def embed(waves: Sequence[np.ndarray], sample_rate_hz: int) -> np.ndarray:
    """The speaker embedding of each wave.

    Args:
        waves: float32 [N] each, at any level. Embeddings of less than a second of speech are unreliable.
        sample_rate_hz: the sample rate of the waves.

    Returns:
        float32 [len(waves) 256], of unit length.

    Raises:
        ValueError: a wave has more than one axis, a sample that is not finite, or only zeros.
        ImportError: resemblyzer is not installed.
    """
    heard, encoder = checked(waves), _encoder()
    return np.stack([encoder.embed_utterance(_prepared(wave, sample_rate_hz)) for wave in heard]).astype(np.float32)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine between speaker embeddings.

    Args:
        a: embeddings [... D].
        b: embeddings [... D].

    Returns:
        float32 [...], in -1 .. 1.

    >>> round(float(similarity(np.array([3.0, 4.0]), np.array([4.0, 3.0]))), 2)
    0.96
    """
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (np.sum(a * b, axis=-1) / norms).astype(np.float32)
