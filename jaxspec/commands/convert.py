"""The command `convert`: a PyTorch checkpoint, or a published drafter, to a folder that jaxspec loads."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxspec.commands.console import report
from jaxspec.convert.pipeline import Converted


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts a PyTorch checkpoint (language model, codec or drafter) to a folder that the other commands read."""

    source: tyro.conf.Positional[str]
    """A directory, a weight file (.safetensors, .pt, .bin), or a Hugging Face hub id."""
    dest: tyro.conf.Positional[Path]
    """The new folder."""
    family: Literal["llasa", "neutts-air", "orpheus", "cosyvoice2", "cosyvoice3", "xcodec2", "neucodec", "snac"] | None = None
    """The family; by default recognised from the files."""
    target: Path | None = None
    """For a published drafter: the folder of its converted target."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; by default its main branch."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the parameters; by default that of the files (float32 for float16 and for codecs)."""
    layers: str | None = None
    """The layers to keep, such as 0,1,18-23, to make a draft from a target; by default all."""
    head: Literal["all", "speech"] = "all"
    """speech: keep the head's rows for codes and stop ids only; smaller and faster, but their probs are renormalised."""
    pad_to: int = 1
    """Pad the rows of head and tables to a multiple of this, so that a mesh divides them."""
    without_encoder: bool = False
    """For a codec, or CosyVoice with its codec: leave out the encoder, which only recordings need; it is the larger part."""
    mesh: str | None = None
    """data=D,model=M: refuse a model that such a mesh would not divide."""
    json: bool = False
    """Print one JSON object on standard output, and the text on standard error."""

    def run(self) -> None:
        """Converts, and prints what was written."""
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators free
        from jaxspec.convert import drafters, pipeline

        layers = parse_layers(self.layers) if self.layers is not None else None
        options = pipeline.Options(self.family, self.dtype, layers, self.head, self.pad_to, not self.without_encoder, self.mesh)
        if self.target is None:
            converted = pipeline.convert(self.source, self.dest, options, self.revision)
        elif options == pipeline.Options(dtype=self.dtype):
            converted = drafters.convert(self.source, self.dest, self.target, self.dtype, self.revision)
        else:
            raise ValueError("expected no other option than --dtype and --revision with --target, got one: leave it out")
        report(card(converted, self.dest), {"folder": str(self.dest), **converted._asdict()}, self.json)


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers in a list of layers.

    Raises:
        ValueError: the text is not such a list.

    >>> parse_layers("0,1,18-20")
    (0, 1, 18, 19, 20)
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"expected layers such as 0,1,18-23, got {text!r}: list numbers and ranges")
    spans = [[*map(int, part.split("-"))] for part in text.split(",")]
    return tuple(i for span in spans for i in range(span[0], span[-1] + 1))


def card(converted: Converted, dest: Path) -> str:
    """The result of a conversion as text: family and size, tensors left out, and notes."""
    dropped = f"tensors left out: {len(converted.dropped)}" + (f", such as {converted.dropped[0]}" if converted.dropped else "")
    lines = [
        f"{converted.family}: {converted.parameters / 1e6:,.1f} M parameters, {converted.bytes / 1e9:.2f} GB in {dest}",
        dropped,
        *(f"note: {note}" for note in converted.notes),
    ]
    return "\n".join(lines)
