"""Voices that were made from recordings: a reference in a file beside its model, encoded once.

    MODEL/voices/NAME.safetensors

The header holds the reference's text and the digest of the codec that encoded it.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from jaxspec.common.files import replacing
from jaxspec.common.trees import flatten, unflatten
from jaxspec.synthesis.contract import Reference

_FORMAT = "jaxspec voice 1"
_NAME = re.compile(r"\w[\w .-]*")


class Stored(NamedTuple):
    """A voice file: a reference, and the digest of the codec that encoded it."""

    reference: Reference
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


def save(path: Path, reference: Reference, encoder: str) -> None:
    """Writes a voice file atomically.

    Args:
        path: see ``path_of``; its folder is created.
        reference: to keep.
        encoder: the digest of the codec that encoded it.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"codes": reference.codes}
    if reference.condition is not None:
        arrays |= {f"condition/{name}": np.ascontiguousarray(array) for name, array in flatten(reference.condition).items()}
    header = {"format": _FORMAT, "text": reference.text, "encoder": encoder}
    with replacing(path) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, header))


def read(path: Path) -> Stored:
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
        reference = Reference(header["text"], arrays["codes"], unflatten(condition) if condition else None)
        return Stored(reference, header["encoder"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"expected a voice file, got {path}: {error}; add the voice again") from error
