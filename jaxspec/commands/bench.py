"""The command `bench`: times of the speculative loop and its parts."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times the speculative loop and its parts against our own autoregressive loop, beside what the device allows."""

    preset: str = "builtin"
    """builtin (the voice, real acceptance), small, llasa-1b, llasa-8b, cosyvoice2 (random weights), or a converted folder."""
    draft: Path | None = None
    """The draft of a converted folder, another one."""
    verify: tuple[Literal["exact", "tolerance", "coarse-grained"], ...] = ("exact", "coarse-grained")
    """The verifiers to time."""
    draft_lengths: tuple[int, ...] = (3,)
    """Codes that are drafted in a round."""
    batches: tuple[int, ...] = (1,)
    """Rows at once."""
    prompts: tuple[int, ...] = (64,)
    """Lengths of the prompt, for random weights."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of weights and caches."""
    synthetic_acceptance: float | None = None
    """Of each position, for random weights: drawn inside the loop in place of the verdict, whose work is done all the same."""
    new_tokens: int = 64
    """Codes that each row emits, at most."""
    turns: int = 5
    """How often each case is timed; the cases take turns."""
    auto: bool = False
    """A row more for each batch: whichever of the others proves the quickest."""
    peer: Literal["transformers"] | None = None
    """Times transformers on the same weights in the same run (preset small)."""
    out_dir: Path | None = None
    """A folder for bench.json, bench.md and bench.png."""
    trace: Path | None = None
    """A folder for a profile of the whole run, for xprof or Perfetto."""

    def run(self) -> None:
        """Times."""
        from jaxspec.bench import report, suite

        plan = suite.Plan(
            self.preset,
            self.draft,
            self.verify,
            self.draft_lengths,
            self.batches,
            self.prompts,
            self.dtypes,
            self.synthetic_acceptance,
            self.new_tokens,
            self.turns,
            self.auto,
            self.peer is not None,
        )
        with jax.profiler.trace(str(self.trace)) if self.trace else contextlib.nullcontext():
            result = suite.bench(plan)
        report.show(result)
        if self.out_dir:
            report.save(self.out_dir, result)
        print(json.dumps(result))
