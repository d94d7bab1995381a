"""The command `tune`: measures how a draft is used best, and writes it into the draft's description."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from jaxspec.bench.settings import OWN
from jaxspec.bench.tuning import PLAIN, Candidates
from jaxspec.checkpoint import descriptions, store
from jaxspec.checkpoint.descriptions import DraftDescription, Tuned
from jaxspec.commands.console import report
from jaxspec.commands.inputs import SamplingOptions, read_lines
from jaxspec.commands.outputs import check_writable
from jaxspec.synthesis.load import NGRAM


@dataclasses.dataclass(frozen=True)
class Tune(SamplingOptions, Candidates):
    """Chooses rule, threshold and draft length for a draft, the fastest within a quality loss, and writes them into its folder.

    `say` and `evaluate` then use them where none are given. A draft without a folder of its own is measured only.
    """

    target: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """A folder that `jaxspec convert` made, or builtin for the built-in voice."""
    draft: str = dataclasses.field(kw_only=True)
    """The folder of a draft that was trained for the target; or ngram, builtin (the voice's own), or a smaller language model."""
    texts: Path = dataclasses.field(kw_only=True)
    """A text file, one text on each line; every piece of them is decoded once by each candidate. 20 are enough."""
    json: bool = False
    """Print one JSON object on standard output, and the table on standard error."""

    def run(self) -> None:
        """Measures and writes; each line of progress goes to standard error.

        Raises:
            ValueError: a setting is out of its range, a text cannot be spoken, or the draft does not fit the target.
        """
        from jaxspec.bench import tuning
        from jaxspec.bench.loading import draft_models, own_draft
        from jaxspec.train import speech

        self.check()
        settings, lines = self.settings(), read_lines(self.texts)
        folder = self._folder()
        target = speech.load_target(self.target)
        draft = draft_models([self.draft], target.pretrained, own_draft(target.synthesizer))[self.draft]
        pieces = [piece for text in speech.texts_of(lines, target.synthesizer) for piece in target.synthesizer.pieces(text)]
        rows = tuning.measure(target, draft, self.draft, self, pieces, settings, lambda line: print(line, file=sys.stderr))
        chosen = tuning.tuned(rows, self)
        if folder:
            descriptions.write_tuned(folder, chosen)
        result: dict[str, Any] = {"rows": rows, "tuned": dataclasses.asdict(chosen), "written": folder is not None}
        report(f"{table(rows, self.max_quality_loss)}\n{sentence(chosen, folder)}", result, self.json)

    def _folder(self) -> Path | None:
        """The folder to write to, None for a draft without a description of its own; checked before any work."""
        if self.draft in (NGRAM, OWN):
            return None
        if not isinstance(descriptions.read(self.draft), DraftDescription):
            return None
        check_writable(Path(self.draft) / store.DESCRIPTION)
        return Path(self.draft)


def table(rows: list[dict[str, Any]], max_quality_loss: float) -> str:
    """The measured rows, the fastest first; those that lose too much are marked."""
    heads = ("rule", "threshold", "K", "round / step", "acceptance", "codes/round", "quality loss", "speedup")
    cells: list[tuple[str, ...]] = [heads]
    for row in sorted(rows, key=lambda row: -row["speed_up"]):
        threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
        acceptance = f"{row['acceptance_rate']:.0%}" if "acceptance_rate" in row else ""
        loss = f"{row['quality_loss']:.1%}" + (" too much" if row["quality_loss"] > max_quality_loss else "")
        figures = f"{row['round_over_step']:.2f}", acceptance, f"{row['tokens_per_round']:.2f}", loss, f"{row['speed_up']:.2f}x"
        cells.append((row["rule"], threshold, str(row["draft_length"] or ""), *figures))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def sentence(chosen: Tuned, folder: Path | None) -> str:
    """What was chosen, and where it was written."""
    if chosen.verify == PLAIN:
        flags = f"--verify {PLAIN}: no draft is faster here within a quality loss of {chosen.max_quality_loss:g}"
    else:
        threshold = "" if chosen.threshold is None else f" --threshold {chosen.threshold:g}"
        flags = f"--verify {chosen.verify} --draft-length {chosen.draft_length}{threshold}"
    where = f"written to {folder / store.DESCRIPTION}" if folder else "not written, as the draft was not trained for this target"
    return f"chosen on {chosen.device}: {flags}; {where}"
