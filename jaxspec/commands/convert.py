"""The command `convert`: a PyTorch checkpoint to a folder that jaxspec loads."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxspec.convert.pipeline import Converted


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts a checkpoint of PyTorch (language model or codec) into a folder that `say --model` takes."""

    source: tyro.conf.Positional[str]
    """A directory, a weight file (.safetensors, .pt, .bin), or an id of the Hugging Face hub."""
    dest: tyro.conf.Positional[Path]
    """The folder to make."""
    family: Literal["llasa", "neutts-air", "orpheus", "cosyvoice2", "cosyvoice3", "xcodec2", "neucodec", "snac"] | None = None
    """What it is; by default told from the files."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the parameters; by default as in the files (float32 for float16 and for codecs)."""
    layers: str | None = None
    """The layers to keep, such as 0,1,18-23: cuts a draft out of a target."""
    head: Literal["all", "speech"] = "all"
    """speech: the head says codes and stop ids alone, which is smaller and quicker, and another law than the checkpoint's."""
    pad_to: int = 1
    """The rows of head and tables become a multiple of it, so that a mesh divides them."""

    def run(self) -> None:
        """Converts."""
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator, if there is one, alone
        from jaxspec.convert import pipeline

        layers = parse_layers(self.layers) if self.layers is not None else None
        options = pipeline.Options(self.family, self.dtype, layers, self.head, self.pad_to)
        print(card(pipeline.convert(self.source, self.dest, options, self.revision), self.dest))


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,18-23".

    Raises:
        ValueError: something else.

    >>> parse_layers("0,1,18-20")
    (0, 1, 18, 19, 20)
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"expected layers such as 0,1,18-23, got {text!r}")
    spans = [[*map(int, part.split("-"))] for part in text.split(",")]
    return tuple(i for span in spans for i in range(span[0], span[-1] + 1))


def card(converted: Converted, dest: Path) -> str:
    """What a conversion made, a line each, with what is worth knowing."""
    dropped = f"left out by name: {len(converted.dropped)}" + (f", such as {converted.dropped[0]}" if converted.dropped else "")
    lines = [
        f"{converted.family}: {converted.parameters / 1e6:,.1f} M parameters, {converted.bytes / 1e9:.2f} GB in {dest}",
        dropped,
        *(f"note: {note}" for note in converted.notes),
    ]
    return "\n".join(lines)
