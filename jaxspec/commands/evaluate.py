"""The command `evaluate`: verifiers side by side on the held-out sentences."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxspec.synthesis.contract import Settings


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compares verifiers on the held-out sentences: word errors, likeness of the voice, acceptance, speed."""

    out_dir: Path = Path("evaluation")
    """The folder for evaluation.json, evaluation.md and evaluation.png."""
    sentences: int = 200
    """How many of the 200 held-out sentences."""
    seeds: int = 3
    """How often each is spoken."""
    betas: tuple[float, ...] = (0.2, 0.4)
    """The tolerances to compare."""
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.85)
    """The cosines to compare."""
    matrix: Literal["target", "codec"] = Settings.matrix
    """Whose vectors the groups are made from."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round."""
    temperature: float | None = Settings.temperature
    """0 is greedy; by default 0.8."""

    def run(self) -> None:
        """Compares."""
        from jaxspec.evaluate import compare, report

        base = Settings(draft_length=self.draft_length, temperature=self.temperature, matrix=self.matrix)
        plan = compare.Plan(self.sentences, self.seeds, self.betas, self.thresholds, base)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        result = compare.compare(plan)
        report.show(result["rows"])
        report.save(self.out_dir, result)
