"""Chooses how a draft is used: measures each rule, threshold and draft length once, and takes the fastest within a quality loss.

The quality loss of a rule is the share of the emitted codes that the exact rule would not have accepted: those that the rule
accepted and that the exact rule rejects with the same uniforms. It needs no recogniser, and is 0 for the exact rules. For
coarse-grained it is what the groups add to the acceptance. Block rules use their uniforms in another way: the decisions of the
exact rule are then independent of those of block-coarse-grained, and the share is an upper bound.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import jaxspec
from jaxspec.bench.cases import Case, DraftModel, Models, groups_of
from jaxspec.bench.measure import run
from jaxspec.checkpoint.descriptions import Tuned
from jaxspec.synthesis.contract import Requests, Synthesizer
from jaxspec.synthesis.contract import Settings as SynthesisSettings
from jaxspec.synthesis.decoding import PLAIN
from jaxspec.train.speech import Target
from jaxspec.verify.rules import Rule

_EXACT = ("exact", "block-exact")
_GROUPED = ("coarse-grained", "block-coarse-grained")
_AROUND = (-0.05, 0.0, 0.05)  # thresholds that are tried around the model's own


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is tried."""

    max_quality_loss: float = 0.0
    """The largest share of the emitted codes that the exact rule would not have accepted with the same random numbers (an upper
    bound for block-coarse-grained); 0 tries the exact rules only, which keep the target's distribution."""
    verify: tuple[Rule, ...] = ("exact", "block-exact", "coarse-grained", "block-coarse-grained")
    """Rules to try."""
    draft_lengths: tuple[int, ...] = (2, 3, 5, 7)
    """Codes to draft in a round (K) to try; those beyond what the draft can propose are left out."""
    thresholds: tuple[float, ...] = ()
    """Cosine thresholds of the coarse-grained rules to try; by default the model's own, and 0.05 less and more."""
    batch: int = 1
    """Pieces of text that are decoded together."""

    def check(self) -> None:
        """Checks every value.

        Raises:
            ValueError: a value is out of its range.
        """
        if not 0 <= self.max_quality_loss <= 1:
            raise ValueError(f"expected a largest quality loss from 0 to 1, got {self.max_quality_loss}: it is a share of codes")
        if unknown := [rule for rule in self.verify if rule not in (*_EXACT, *_GROUPED)]:
            known = ", ".join((*_EXACT, *_GROUPED))
            raise ValueError(f"expected rules among {known}, got {unknown[0]!r}: the tolerance rules have no guarantee to keep")
        if not self.verify or not self.draft_lengths or min((*self.draft_lengths, self.batch)) < 1:
            raise ValueError(
                f"expected a rule, and draft lengths and a batch of 1 or more, got {self.verify}, {self.draft_lengths} and "
                f"{self.batch}: leave them out for the usual ones"
            )
        if wrong := [value for value in self.thresholds if not -1 < value <= 1]:
            raise ValueError(f"expected thresholds in (-1, 1], as they are cosines, got {wrong[0]}: 0.85 is usual")

    def cases(self, draft: str, own_threshold: float, longest: int | None) -> list[Case]:
        """Every case, the plain loop first.

        Args:
            draft: its name.
            own_threshold: the model's.
            longest: the largest K that the draft can propose; None: any.

        Raises:
            ValueError: nothing is left to try.
        """
        lengths = sorted({k for k in self.draft_lengths if longest is None or k <= longest})
        tried = self.thresholds or tuple(round(own_threshold + by, 6) for by in _AROUND if own_threshold + by < 1)
        exact = [(rule, None) for rule in self.verify if rule in _EXACT]
        grouped = list(itertools.product((rule for rule in self.verify if rule in _GROUPED), tried))
        rules = [*exact, *(grouped if self.max_quality_loss else [])]
        if not lengths or not rules:
            raise ValueError(
                f"expected a draft length of at most {longest} and a rule within a loss of {self.max_quality_loss}, got "
                f"{self.draft_lengths} and {self.verify}: allow more of them"
            )
        made = [Case(rule, k, self.batch, 0, draft, threshold) for (rule, threshold), k in itertools.product(rules, lengths)]
        return [Case(PLAIN, 0, self.batch, 0), *made]


def measure(
    target: Target,
    draft: DraftModel,
    name: str,
    candidates: Candidates,
    pieces: Sequence[str],
    settings: SynthesisSettings,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Decodes all pieces with every candidate, interleaved.

    Args:
        target: the model.
        draft: for it.
        name: of the draft.
        candidates: what is tried.
        pieces: of texts.
        settings: how the target is sampled when the draft is used.
        progress: called with a line of text for each step.

    Returns:
        A row for each case, the plain loop first: see ``bench.measure``; its "speed_up" is the one that tokens_per_round
        and the median times of a round and a step give.

    Raises:
        ValueError: nothing is left to try, or a prompt cannot be made.
    """
    synthesizer = target.synthesizer
    cases = candidates.cases(name, synthesizer.threshold, draft.drafter.max_length)
    batches = _batches(synthesizer, pieces, candidates.batch, settings)
    models = Models(
        name=name,
        target=target.pretrained.model.shape,
        target_params=target.pretrained.params,
        drafts={name: draft},
        groups=groups_of(synthesizer),
        requests=lambda case, repeat: batches[repeat % len(batches)],
    )
    rows = run(models, cases, len(batches), progress, parts=False)
    for row in rows:
        row["speed_up"] = row["tokens_per_round"] / row["round_over_step"]
        row["quality_loss"] = 0.0 if row["rule"] in (*_EXACT, PLAIN) else row["quality_loss"]
    return rows


def _batches(synthesizer: Synthesizer, pieces: Sequence[str], batch: int, settings: SynthesisSettings) -> list[Requests]:
    """The requests of all pieces, the last batch filled up, all of one shape, so that nothing recompiles."""
    padded = [*pieces, *pieces[: -len(pieces) % batch]] if len(pieces) >= batch else [*pieces] * batch
    firsts = range(0, len(padded) - len(padded) % batch, batch)
    made = [synthesizer.requests(padded[first : first + batch], settings) for first in firsts]
    width, most = max(one.prompt.shape[1] for one in made), max(one.max_new_tokens for one in made)
    return [
        one._replace(prompt=np.pad(one.prompt, ((0, 0), (0, width - one.prompt.shape[1]))), max_new_tokens=most) for one in made
    ]


def choose(rows: Sequence[dict[str, Any]], max_quality_loss: float) -> dict[str, Any]:
    """The fastest row within a quality loss; the plain loop is one of them.

    >>> rows = [{"speed_up": 1.0, "quality_loss": 0.0}, {"speed_up": 1.5, "quality_loss": 0.2}]
    >>> choose(rows, 0.1)["speed_up"], choose(rows, 0.2)["speed_up"]
    (1.0, 1.5)
    """
    return max((row for row in rows if row["quality_loss"] <= max_quality_loss), key=lambda row: row["speed_up"])


def tuned(rows: Sequence[dict[str, Any]], candidates: Candidates) -> Tuned:
    """What is written into the draft's description: the fastest row; where it is the plain loop, with the best draft length."""
    chosen = choose(rows, candidates.max_quality_loss)
    best = choose([row for row in rows if row["draft_length"]], 1.0) if chosen["rule"] == PLAIN else chosen
    return Tuned(
        verify=chosen["rule"],
        draft_length=best["draft_length"],
        threshold=chosen["threshold"],
        max_quality_loss=candidates.max_quality_loss,
        quality_loss=chosen["quality_loss"],
        tokens_per_round=chosen["tokens_per_round"],
        speed_up=chosen["speed_up"],
        batch=candidates.batch,
        device=jax.devices()[0].device_kind,
        version=jaxspec.__version__,
    )
