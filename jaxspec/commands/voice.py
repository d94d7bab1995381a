"""The command `voice`: adds the voice of a recording to a converted model, and lists the voices that it has."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from jaxspec.checkpoint import descriptions, voices
from jaxspec.checkpoint.descriptions import CodecDescription
from jaxspec.commands.console import report
from jaxspec.commands.inputs import check_reference_file, read_reference
from jaxspec.models.card import Model
from jaxspec.synthesis.load import codec_folder, load


@dataclasses.dataclass(frozen=True)
class Voice:
    """Adds the voice of a recording to a model, for `jaxspec say --voice NAME`; or lists a model's voices."""

    action: tyro.conf.Positional[Literal["add", "list"]]
    """add encodes a recording once and keeps it; list prints the names."""
    model: tyro.conf.Positional[Path]
    """A checkpoint that `jaxspec convert` made."""
    name: tyro.conf.Positional[str | None] = None
    """Of the voice to add."""
    reference: Path | None = None
    """A recording of some seconds (.wav, .flac, .mp3, .ogg)."""
    reference_text: str = ""
    """What the recording says."""
    codec: Path | None = None
    """The folder of the model's codec; by default the folder codec in that of the model."""
    json: bool = False
    """Print one JSON object on standard output, and the text on standard error."""

    def run(self) -> None:
        """Adds or lists."""
        own = descriptions.read_as(self.model, Model).voices
        if self.action == "list":
            if self.name is not None or self.reference is not None or self.reference_text:
                raise ValueError("expected nothing but a model to list its voices, got a name or a reference: leave it out")
            found = [*own, *voices.names(self.model)]
            report("\n".join(found) or "no voices: add one with jaxspec voice add", {"voices": found}, self.json)
            return
        if self.name is None or self.reference is None:
            raise ValueError(
                "expected a name and --reference to add a voice, got one of them: voice add DIR NAME --reference a.wav"
            )
        path, codec = voices.path_of(self.model, self.name), codec_folder(self.model, self.codec)
        if self.name in own or path.exists():
            raise ValueError(f"expected a new name, got {self.name!r}, which {self.model} has: choose another")
        if codec is None:
            raise ValueError(f"expected a codec to encode the recording, got none in {self.model}: give --codec")
        check_reference_file(self.reference, self.reference_text)
        reference = read_reference(self.reference, self.reference_text, load(self.model, codec=codec))
        digest = descriptions.read_as(codec, CodecDescription).digest
        voices.save(path, voices.Voice(reference.text, reference.codes, reference.condition, digest))
        kept = {"voice": self.name, "file": str(path), "codes": len(reference.codes)}
        report(f"{self.name}: {len(reference.codes)} codes in {path}", kept, self.json)
