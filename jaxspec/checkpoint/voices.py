"""Voices that were made from recordings, each in a file of its model's folder: MODEL/voices/NAME.safetensors."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from jaxspec.common.files import replacing
from jaxspec.common.trees import flatten, unflatten

_FORMAT = "jaxspec voice 1"
_NAME = re.compile(r"\w[\w .-]*")


class Voice(NamedTuple):
    """A recording, encoded.

    Attributes:
        text: what it says.
        codes: int32 [T] or [T Q].
        condition: what the codec's decoder is given of it, a nested dict of arrays, or None.
        encoder: the digest of the codec that encoded it.
    """

    text: str
    codes: np.ndarray
    condition: dict[str, Any] | None
    encoder: str


def path_of(folder: Path, name: str) -> Path:
    """The file of a voice.

    Raises:
        ValueError: the name is not one of letters, digits, spaces, ".", "-" and "_".
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f'expected the name of a voice, letters, digits, " ", ".", "-" and "_", got {name!r}: choose another')
    return folder / "voices" / f"{name}.safetensors"


def names(folder: Path) -> list[str]:
    """The names of a model's voices, sorted."""
    return sorted(path.stem for path in (folder / "voices").glob("*.safetensors"))


def save(path: Path, voice: Voice) -> None:
    """Writes a voice file atomically; its folder is created.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    condition = {f"condition/{name}": np.ascontiguousarray(array) for name, array in flatten(voice.condition or {}).items()}
    header = {"format": _FORMAT, "text": voice.text, "encoder": voice.encoder}
    with replacing(path) as partial:
        partial.write_bytes(safetensors.numpy.save({"codes": voice.codes, **condition}, header))


def read(path: Path) -> Voice:
    """Reads a voice file.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if header.get("format") != _FORMAT:
            raise ValueError(f"format {header.get('format')!r} in place of {_FORMAT!r}")
        condition = {name.removeprefix("condition/"): array for name, array in arrays.items() if name != "codes"}
        return Voice(header["text"], arrays["codes"], unflatten(condition) if condition else None, header["encoder"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"expected a voice file, got {path}: {error}; add the voice again") from error
