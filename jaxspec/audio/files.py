"""Recordings: reads them from files, and checks that one can be a reference."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

MIN_RATE_HZ = 16_000  # of a reference: below it the high frequencies of speech are missing
MIN_LEVEL_DB = -60.0


def read(path: str | Path) -> tuple[np.ndarray, int]:
    """Reads a recording: wav, flac, mp3, ogg, or what else libsndfile reads.

    Args:
        path: of the file.

    Returns:
        The mean of its channels, float32 [N] in [-1, 1], and its sample rate in Hz.

    Raises:
        ValueError: the file is not a recording, is damaged or empty, or has samples that are not finite.
        OSError: there is no such file, or it cannot be read.
    """
    with Path(path).open("rb") as file:
        return decode(file, str(path))


def decode(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """Reads a recording from an open file, or from bytes in memory; see ``read``. ``name`` is what errors call it."""
    import soundfile

    try:
        samples, rate_hz = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"expected a wav, flac, mp3 or ogg file, got {name}: {error.error_string} Convert it") from error
    if not len(samples):
        raise ValueError(f"expected a recording, got {name} without samples: record it again")
    if not np.isfinite(samples).all():
        raise ValueError(f"expected finite samples, got NaN or infinity in {name}: export it again")
    return samples.mean(1), rate_hz


def check_reference(wave: np.ndarray, rate_hz: int, *, seconds: tuple[float, float] = (0.5, 30.0)) -> None:
    """Refuses a recording that cannot be the reference of a voice.

    Args:
        wave: float32 [N] in [-1, 1].
        rate_hz: its sample rate as it was recorded.
        seconds: the shortest and the longest duration.

    Raises:
        ValueError: it is too short, too long, silent, or of a low sample rate.
    """
    (low, high), duration_s = seconds, len(wave) / rate_hz
    if duration_s < low:
        raise ValueError(f"expected a reference of {low:g} s or more, got {duration_s:.2f} s: record a sentence")
    if duration_s > high:
        raise ValueError(f"expected a reference of {high:g} s or less, got {duration_s:.2f} s: cut it and its text")
    if rate_hz < MIN_RATE_HZ:
        raise ValueError(f"expected a reference at {MIN_RATE_HZ} Hz or more, got {rate_hz} Hz: record it at a higher rate")
    level_db = 20 * np.log10(max(np.std(wave, dtype=np.float64), 1e-10))  # a constant is silence too
    if level_db < MIN_LEVEL_DB:
        raise ValueError(f"expected a reference louder than {MIN_LEVEL_DB:g} dB, got {level_db:.0f} dB: record it again")
