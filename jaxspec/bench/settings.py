"""What a benchmark times: its settings, and the cases that follow from them."""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

from jaxspec import mirror
from jaxspec.bench import presets
from jaxspec.bench.cases import Case
from jaxspec.verify.rules import RULES, Rule

OWN = "builtin"  # the name of a preset's own draft


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to benchmark."""

    preset: str = "builtin"
    """builtin (the voice), small, llasa-1b, llasa-3b, llasa-8b, cosyvoice2 (random weights), or a folder of `jaxspec convert`."""
    draft: tuple[str, ...] = ()
    """What drafts, several side by side: builtin (the preset's own draft, the default), ngram, or for real weights folders."""
    verify: tuple[Rule, ...] = ("exact", "coarse-grained")
    """Verifiers to time."""
    draft_lengths: tuple[int, ...] = (3,)
    """Codes to draft in a round (K)."""
    batches: tuple[int, ...] = (1,)
    """Batch sizes."""
    prompts: tuple[int, ...] = (64,)
    """Lengths of the prompts, for random weights."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of weights and caches."""
    weights: Literal["float", "int8"] = "float"
    """int8: random weights in int8, see `jaxspec convert --weights int8`."""
    synthetic_acceptance: float | None = None
    """Probability that a drafted code is accepted, for random weights. The verifier's work is done all the same."""
    new_tokens: int = 64
    """Codes that each row emits, at most."""
    repeats: int = 5
    """How often each case is timed; the cases are interleaved."""
    mirror: tuple[str, ...] = ()
    """Time each draft, if it is a model of its own, also on devices of its own: draft=1, or draft=1,candidates=4,exit=6."""
    auto: bool = False
    """Add a row for each batch that uses the fastest of the other cases."""
    peer: Literal["transformers"] | None = None
    """Time transformers on the same weights in the same run (preset small)."""

    @property
    def drafts(self) -> tuple[str, ...]:
        """The names of the drafts."""
        return self.draft or (OWN,)

    @property
    def real(self) -> bool:
        """Whether the weights are real: the built-in voice's, or a folder's."""
        return self.preset == "builtin" or Path(self.preset).is_dir()

    def check(self) -> None:
        """Checks every value.

        Raises:
            ValueError: a value is out of its range, or does not go with another.
        """
        known = ("builtin", *presets.PAIRS)
        if not self.real and self.preset not in known:
            raise ValueError(
                f"expected a preset among {', '.join(known)}, or a folder that `jaxspec convert` made, got {self.preset!r}: "
                "choose one of these"
            )
        for name, values, known in (("verifiers", self.verify, RULES), ("dtypes", self.dtypes, ("float32", "bfloat16"))):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"expected {name} among {', '.join(known)}, got {unknown[0]!r}: choose one of these")
        if self.real and self.preset != OWN and OWN in self.drafts:
            raise ValueError(
                f"expected --draft with {self.preset}, got none: give ngram, or a folder that `jaxspec convert --layers` or "
                "`jaxspec train-draft` made"
            )
        if len(set(self.drafts)) < len(self.drafts):
            raise ValueError(f"expected different drafts, got {', '.join(self.drafts)}: name each once")
        for option in self.mirror:
            mirror.meshes(mirror.parse(option).devices)
        counts = (*self.draft_lengths, *self.batches, *self.prompts, self.new_tokens, self.repeats)
        if min(counts) < 1:
            raise ValueError(f"expected draft lengths, batches, prompts, new tokens and repeats of 1 or more, got {min(counts)}")
        if self.real and self.synthetic_acceptance is not None:
            raise ValueError(f"expected no synthetic acceptance for {self.preset}, whose weights are real: leave it out")
        if self.real and self.weights != "float":
            raise ValueError(
                f"expected a preset of random weights for --weights {self.weights}, got {self.preset}: convert a model with it "
                "and give its folder"
            )
        if self.real and self.peer:
            raise ValueError(f"expected a preset of random weights for --peer, got {self.preset}: use small")
        if not self.real and not 0 <= (-1 if self.synthetic_acceptance is None else self.synthetic_acceptance) <= 1:
            raise ValueError(
                f"expected --synthetic-acceptance from 0 to 1 for {self.preset}, whose weights are random, got "
                f"{self.synthetic_acceptance}: give one"
            )

    def cases(self) -> list[Case]:
        """Every case of one dtype, the autoregressive ones first."""
        shapes = list(itertools.product(self.batches, (0,) if self.real else self.prompts))
        plain = [Case("autoregressive", 0, *shape) for shape in shapes]
        methods = list(itertools.product(self.drafts, self.verify, self.draft_lengths, ("", *self.mirror)))
        drafted = [Case(rule, k, *shape, draft, mirror=where) for shape in shapes for draft, rule, k, where in methods]
        return plain + drafted + [Case("auto", 0, *shape) for shape in shapes if self.auto]
