"""The files that commands write: sound in the format of the suffix, or codes."""

import os
from pathlib import Path

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.synthesis.contract import Synthesizer
from jaxspec.synthesis.pipeline import Utterance

_FORMATS = (".wav", ".flac", ".ogg")


def check_kind(path: Path, synthesizer: Synthesizer) -> None:
    """Raises ValueError where a speaker cannot fill a file of this kind."""
    suffix = path.suffix.lower()
    if suffix not in (*_FORMATS, ".npy"):
        raise ValueError(f"expected a sound file that ends in {', '.join(_FORMATS)}, or .npy for codes, got {path}")
    if suffix != ".npy" and synthesizer.decode is None:
        raise ValueError(
            f"expected a codec to make sound for {path}: give --codec DIR, or --out FILE.npy for the codes "
            "(of CosyVoice they are all that comes out: its flow and vocoder are not here)"
        )


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be put."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"expected a path that can be written to, got {path}: choose a file in a folder of yours that exists")


def write(path: Path, utterance: Utterance) -> None:
    """Writes 16-bit samples in the format that the suffix names, or the codes; the file appears whole or not at all."""
    import soundfile

    suffix = path.suffix.lower()
    with replacing(path) as partial:
        if suffix == ".npy":
            with partial.open("wb") as file:  # to a path, numpy would add the suffix in small letters
                np.save(file, utterance.codes)
            return
        soundfile.write(partial, utterance.wave, utterance.sample_rate_hz, subtype="VORBIS" if suffix == ".ogg" else "PCM_16")
