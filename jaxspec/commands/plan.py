"""The command `plan`: programs compiled for a TPU that is not attached."""

import dataclasses
import sys
from pathlib import Path

import jax

from jaxspec.bench.plan_shapes import Settings
from jaxspec.commands.console import report


@dataclasses.dataclass(frozen=True)
class Plan(Settings):
    """Compiles the prefill and the loops, a step of training, or the flow and the vocoder, for TPUs, without one.

    The card has memory, time, and checks of the program.

    Exits with 0 if the program fits in the chip and every check holds, with 1 if not, and with 2 on bad input.
    """

    train_draft: str | None = None
    """Plan a step of training a draft by this recipe, with the weights divided over all chips, in place of the loops."""
    sound: float | None = None
    """Plan the flow and the vocoder of cosyvoice2 or cosyvoice3 for so many seconds of speech, in place of the loops."""
    sweep: Path | None = None
    """Plan every mesh of all devices and every batch of BATCHES; a folder for sweep.json, sweep.md and sweep.png."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Batches of the sweep."""
    acceptance: float = 0.75
    """Acceptance of a drafted token, which the sweep takes for granted."""
    json: bool = False
    """Print the result as JSON on standard output, and the card on standard error."""

    def run(self) -> None:
        """Compiles, and prints the card.

        Raises:
            ValueError: a setting is out of its range, or the parts do not fit in the chip.
            ImportError: libtpu is not installed.
            SystemExit: with 1, the compiled program does not fit, or nothing in a sweep does, or a check fails.
        """
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator, if there is one, alone
        from jaxspec.bench import plan, plan_report, plan_sound, plan_sweep, plan_training

        if self.weights and (self.train_draft or self.sound is not None):
            raise ValueError(f"expected no --weights with --train-draft or --sound, got {self.weights}: leave it out")
        if self.sweep:
            result = plan_sweep.sweep(self, self.batches, self.acceptance, lambda line: print(line, file=sys.stderr, flush=True))
            plan_sweep.save(self.sweep, result)
            report(plan_sweep.table(result), result, self.json)
            passes = result["most_codes"] is not None and not any(row.get("failing") for row in result["rows"])
        elif self.train_draft:
            result = plan_training.plan(plan_training.TrainingSettings(self.model, self.topology, self.train_draft))
            report(plan_training.card(result), result, self.json)
            passes = result["memory"]["fits"]
        elif self.sound is not None:
            wanted = plan_sound.SoundSettings(self.model, self.topology, self.batch, self.sound, self.dtype)
            result = plan_sound.plan(wanted)
            report(plan_sound.card(result), result, self.json)
            passes = result["flow"]["memory"]["fits"] and result["vocoder"]["memory"]["fits"]
        else:
            result = plan.plan(self)
            report(plan_report.card(result), result, self.json)
            passes = plan_report.passes(result)
        if not passes:
            sys.exit(1)
