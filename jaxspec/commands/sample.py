"""The command `sample`: the target's own speech from texts, to train drafts on."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from jaxspec.commands.console import progress_bar, report
from jaxspec.commands.inputs import SamplingOptions, read_lines
from jaxspec.commands.mesh import OnMesh
from jaxspec.commands.outputs import make_folder
from jaxspec.synthesis.contract import Settings
from jaxspec.train import speech
from jaxspec.train.speech import Speech, Target


@dataclasses.dataclass(frozen=True)
class Deployment(SamplingOptions):
    """How the target is sampled when the draft is used."""

    seed: int = Settings.seed
    """Of the samples, any whole number from 0 up."""
    batch: int | None = None
    """Texts that are sampled together; by default 16 for the built-in voice, and 8 for a model."""
    voice: str | None = None
    """Names separated by commas, which the batches take in turn; by default both of the built-in voice, or the model's first."""

    def settings(self) -> Settings:
        """The settings without a voice."""
        return dataclasses.replace(super().settings(), seed=self.seed)

    def speech(self, texts: Path, target: Target) -> Speech:
        """What is sampled from the lines of a file.

        Raises:
            ValueError: the file is empty, or a line cannot be spoken.
        """
        batch = target.synthesizer.max_batch if self.batch is None else self.batch
        if batch < 1:
            raise ValueError(f"expected a batch of 1 or more, got {batch}: leave it out for the model's own")
        voices = tuple(self.voice.split(",")) if self.voice else target.voices
        lines = tuple(speech.texts_of(read_lines(texts), target.synthesizer))
        return Speech(lines, self.settings(), voices, batch)


@dataclasses.dataclass(frozen=True)
class Sample(OnMesh, Deployment):
    """Samples a target's own speech from texts, to train drafts on. Run it again to resume."""

    target: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """A folder that `jaxspec convert` made, or builtin for the built-in voice."""
    texts: Path = dataclasses.field(kw_only=True)
    """A text file, one text on each line; - is standard input."""
    out: Path = dataclasses.field(kw_only=True)
    """The folder of the samples; shards that it holds are kept."""
    json: bool = False
    """Print one JSON object on standard output, and the text on standard error."""

    def divided(self) -> str:
        """See ``OnMesh``."""
        return self.target

    def run(self) -> None:
        """Samples, with a progress bar on standard error."""
        target = speech.load_target(self.target)
        what = self.speech(self.texts, target)
        make_folder(self.out)
        with progress_bar("sampling") as progress:
            made = speech.sample(self.out, what, target, progress)
        result: dict[str, Any] = {"folder": str(self.out), **made._asdict()}
        report(f"{made.finished} of {made.pieces} pieces ended, {made.tokens} tokens in {self.out}", result, self.json)
