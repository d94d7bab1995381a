"""The command `train-draft`: a draft for any target, from texts alone or from samples."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jaxspec.commands.console import progress_bar, report
from jaxspec.commands.mesh import OnMesh
from jaxspec.commands.sample import Deployment
from jaxspec.sampling import Sampling
from jaxspec.train import recipe as recipes
from jaxspec.train import speech
from jaxspec.train.costs import named
from jaxspec.train.log import locked
from jaxspec.train.samples import Samples
from jaxspec.train.speech import Target

if TYPE_CHECKING:
    from jaxspec.train.trainer import Trained


@dataclasses.dataclass(frozen=True)
class TrainDraft(OnMesh, Deployment):
    """Trains a draft for a target, which the other commands take by --draft. Run it again to resume.

    Checkpoints, the log and training.png are in DRAFT.training; DRAFT appears at the end.
    """

    target: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """A folder that `jaxspec convert` made, or builtin for the built-in voice."""
    out: Path = dataclasses.field(kw_only=True)
    """The new folder of the draft."""
    recipe: str = dataclasses.field(default="distil", kw_only=True)
    """ssd, pcg, distil, group, block, recurrent, eagle, medusa, streaming, voice (a block drafter for the built-in voice), or a
    .toml file like those in configs/train."""
    texts: Path | None = None
    """A text file, one text on each line, from which the target is sampled first."""
    data: Path | None = None
    """A folder of `jaxspec sample`, or of codes with texts, in place of --texts."""
    cache_features: bool = False
    """Compute the target's hidden states once, and keep them in DRAFT.training, in place of a pass in each step."""
    steps: int | None = None
    """Optimizer steps; by default the recipe's."""
    json: bool = False
    """Print one JSON object on standard output, and the text on standard error."""

    def divided(self) -> str:
        """See ``OnMesh``."""
        return self.target

    def run(self) -> None:
        """Trains; each line of progress goes to standard error."""
        from jaxspec.train import trainer  # imports Orbax, which is slow

        recipe = recipes.read(self.recipe, **({} if self.steps is None else {"steps": self.steps}))
        if (self.texts is None) == (self.data is None):
            raise ValueError("expected either --texts or --data, got both or neither: give one of them")
        target = speech.load_target(self.target, recipe.dtype or None)
        samples, sampling = self._samples(recipe, target)
        progress = functools.partial(print, file=sys.stderr)
        trained = trainer.train(self.out, recipe, target, samples, sampling, progress, self.cache_features)
        report(card(trained, self.out), figures(trained, self.out), self.json)

    def _samples(self, recipe: recipes.Recipe, target: Target) -> tuple[Samples, Sampling]:
        """The samples to train on, and how the target is sampled when the draft is used."""
        from jaxspec.train import trainer

        if self.data is not None:
            found = speech.read(self.data, target)
            trainer.begin(self.out, recipe, target)
            return found, self.settings().sampling(speech.sampling_of(self.data, target))
        assert self.texts is not None
        what = self.speech(self.texts, target)
        folder = trainer.begin(self.out, recipe, target)
        with locked(folder, "samples.lock"), progress_bar("sampling") as progress:
            speech.sample(folder / "samples", what, target, progress)
        return speech.read(folder / "samples", target), self.settings().sampling(target.sampling)


def figures(trained: "Trained", out: Path) -> dict[str, Any]:
    """The result as JSON values."""
    description = trained.description
    return {"folder": str(out), "parameters": description.parameters, "digest": description.digest, **trained.last}


def card(trained: "Trained", out: Path) -> str:
    """The result as text."""
    description, last = trained.description, trained.last
    lines = [f"draft {description.family}: {description.parameters / 1e6:,.2f} M parameters in {out}"]
    for name, key in (("acceptance by position", "acceptance"), ("tokens a round", "tokens"), ("predicted speed-up", "speed_up")):
        for rule in ("exact", "groups"):
            lines.append(f"{name}, {rule}: {named(last[f'{key}_{rule}'])}")
    return "\n".join(lines)
