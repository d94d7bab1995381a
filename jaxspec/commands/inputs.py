"""What commands read: texts from an argument, a file or standard input, a reference recording's codes; and how they sample."""

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np

from jaxspec.common import hosts
from jaxspec.synthesis.contract import Reference, Settings, Synthesizer

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a target is sampled when a draft is used."""

    temperature: float | None = Settings.temperature
    """By default 0.8 for the built-in voice, or the model's own."""
    top_k: int | None = Settings.top_k
    """Sample from the k most probable codes only; 0 is off; by default the model's own."""
    top_p: float | None = Settings.top_p
    """Sample from the most probable codes that together reach this probability; by default 0.95, or the model's own."""
    min_p: float | None = Settings.min_p
    """Sample from codes with at least this share of the best one's probability; 0 is off; by default the model's own."""
    max_codes: int | None = Settings.max_codes
    """The most tokens of each piece of a text; by default the model's own limit."""

    def settings(self) -> Settings:
        """The settings without a voice."""
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingOptions)})


def read_text(text: str | None) -> str:
    """The text of an argument; that of the first host's standard input where it is "-", or missing and something is piped in.

    Raises:
        ValueError: there is no text.
    """
    if text == STANDARD_INPUT or (text is None and hosts.from_first(lambda: not sys.stdin.isatty())):
        text = hosts.from_first(sys.stdin.read)
    if text is None or not text.strip():
        raise ValueError('expected a text, got none: jaxspec say "..." --out hello.wav, or pipe it in')
    return text


def read_lines(path: Path) -> dict[int, str]:
    """The texts of a file by their line numbers, from 1; empty lines are left out. "-" is standard input. The first host reads.

    Raises:
        ValueError: the file cannot be read, or holds no text.
    """
    try:
        read = sys.stdin.read if str(path) == STANDARD_INPUT else functools.partial(path.read_text, encoding="utf-8-sig")
        content = hosts.from_first(read)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a text file in UTF-8, got {path}: {error}") from error
    lines = {number: line for number, line in enumerate(content.splitlines(), 1) if line.strip()}
    if not lines:
        raise ValueError(f"expected a text on each line of {path}, got an empty file: write some")
    return lines


def check_reference_file(path: Path | None, text: str) -> None:
    """Refuses a reference that cannot be read, before a model is loaded.

    Raises:
        ValueError: the file is missing, or there is a text without a file.
    """
    if path is None and text:
        raise ValueError("expected --reference with --reference-text, got the text only: give both")
    if path is not None and not path.is_file():
        raise ValueError(f"expected a recording, or a .npy file of its codes, got {path}: no such file")


def read_reference(path: Path, text: str, synthesizer: Synthesizer) -> Reference:
    """A reference from a recording, or from a .npy file of its codes, and the text that the recording says.

    Raises:
        ValueError: the file holds neither, or the synthesizer cannot take it.
    """
    if path.suffix.lower() != ".npy":
        return Reference.from_wav(path, synthesizer, text)
    try:
        with path.open("rb") as file:
            codes = np.lib.format.read_array(file, allow_pickle=False)
        return Reference(text, codes)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a .npy file of reference codes, got {path}: {error}") from error
