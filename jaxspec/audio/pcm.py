"""Waves as bytes while they come: 16-bit samples, and the header of a WAV file whose length is not known yet."""

import struct

import numpy as np

_UNKNOWN = 2**32 - 1  # the size that says: until the end


def pcm16(wave: np.ndarray) -> bytes:
    """A wave float32 [N] in [-1, 1] as signed 16-bit little-endian samples.

    >>> pcm16(np.array([0, 1, -1], np.float32)).hex()
    '0000ff7f0180'
    """
    return np.round(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()


def wav_header(sample_rate_hz: int, num_bytes: int | None = None) -> bytes:
    """The header of a WAV file with one channel of 16-bit samples.

    Args:
        sample_rate_hz: of the samples.
        num_bytes: of the samples; None: as many as will come.
    """
    riff, data = (_UNKNOWN, _UNKNOWN) if num_bytes is None else (36 + num_bytes, num_bytes)
    kind = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate_hz, 2 * sample_rate_hz, 2, 16)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + kind + b"data" + struct.pack("<I", data)
