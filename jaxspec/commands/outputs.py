"""The files that commands write: sound in the format of the suffix, codes, and pictures."""

import os
import tempfile
from pathlib import Path

import numpy as np

from jaxspec.common import hosts
from jaxspec.common.files import replacing
from jaxspec.synthesis.pipeline import Utterance

SOUND = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}  # suffix -> subtype of libsndfile
CODES = ".npy"


def check_output(path: Path) -> None:
    """Refuses a file that is neither sound nor codes, or that cannot be written.

    Raises:
        ValueError: with what to do.
    """
    if path.suffix.lower() not in (*SOUND, CODES):
        raise ValueError(f"expected a file that ends in {', '.join(SOUND)}, or {CODES} for codes, got {path}: choose one of them")
    check_writable(path)


def check_picture(path: Path) -> None:
    """Refuses a picture that is not a PNG, or that cannot be written.

    Raises:
        ValueError: with what to do.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a picture that ends in .png, got {path}: pictures are PNG files")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Writes an empty file beside ``path`` and removes it, on the first host, which alone writes.

    Raises:
        ValueError: that cannot be done.
    """
    if not hosts.is_first():
        return
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".jaxspec-")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"expected a path that can be written to, got {path} ({why}): choose a file in a folder of yours"
        ) from None


def make_folder(path: Path) -> None:
    """Creates a folder unless it exists, on the first host.

    Raises:
        ValueError: it cannot be created.
    """
    if not hosts.is_first():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected a folder that can be created, got {path} ({error.strerror}): choose another") from None


def write(path: Path, utterance: Utterance) -> None:
    """Writes the sound in the format that the suffix names, or the codes, atomically."""
    suffix = path.suffix.lower()
    with replacing(path) as partial:
        if suffix == CODES:
            with partial.open("wb") as file:  # to a path, numpy would add the suffix in small letters
                np.save(file, utterance.codes)
            return
        import soundfile

        soundfile.write(partial, utterance.wave, utterance.sample_rate_hz, subtype=SOUND[suffix])
