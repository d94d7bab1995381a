"""What is benchmarked: the cases, and the models, requests and verifiers that they run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.groups import Groups
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis.contract import Drafter, Requests, Synthesizer, target_of
from jaxspec.types import Array, LanguageModel, Params, Verdict, Verify
from jaxspec.verify.exact import count_accepted
from jaxspec.verify.rules import by_name

_ACCEPT_STREAM = 77


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        rule: one of ``verify.rules.RULES``; or, with a draft length of 0, "autoregressive", or "auto", the fastest of the other
            cases.
        draft_length: K.
        batch: B.
        prompt: tokens of each prompt; 0 where texts determine the prompts.
        draft: the name of what drafts; "" without a draft.
        threshold: of the groups; None is the model's own.
        mirror: the devices of the draft, see ``mirror.parse``; "" where they are the target's.
    """

    rule: str
    draft_length: int
    batch: int
    prompt: int
    draft: str = ""
    threshold: float | None = None
    mirror: str = ""

    @property
    def method(self) -> str:
        """The rule with its threshold where one is given, the draft length and the draft."""
        rule = self.rule if self.threshold is None else f"{self.rule} {self.threshold:g}"
        rule = f"{rule} mirror {self.mirror}" if self.mirror else rule
        return f"{rule} K={self.draft_length}" + (f" {self.draft}" if self.draft else "") if self.draft_length else rule

    def __str__(self) -> str:
        return f"{self.method} batch={self.batch}" + (f" prompt={self.prompt}" if self.prompt else "")


class DraftModel(NamedTuple):
    """A drafter to be timed, and its shape for its roofline; None where it is not a transformer."""

    drafter: Drafter
    shape: Config | None


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """A target and its drafts to be timed.

    Attributes:
        name: of the preset.
        target: the shape of the target, without features.
        target_params: its parameters.
        drafts: by name.
        groups: threshold, None for the model's own -> the groups of the coarse-grained verifiers.
        requests: (case, number of the repeat) -> its requests; real models get other texts in each.
        beta: of the tolerance verifier.
        acceptance: the probability that a drafted token is accepted, drawn in place of the verdict, which is computed all the
            same; None: the verifier decides.
    """

    name: str
    target: Config
    target_params: Params
    drafts: Mapping[str, DraftModel]
    groups: Callable[[float | None], Groups]
    requests: Callable[[Case, int], Requests]
    beta: float = 0.2
    acceptance: float | None = None

    def lm(self, draft: str = "") -> LanguageModel:
        """The target's functions with the features that a draft reads; the plain loop's, which computes none, for ""."""
        return target_of(self.target, self.drafts[draft].drafter if draft else None)

    def verifier(self, rule: str, threshold: float | None = None) -> Verify:
        """A verifier by name, with the synthetic acceptance where one is given."""
        made = by_name(rule, self.beta, lambda: self.groups(threshold))
        return made if self.acceptance is None else jax.tree_util.Partial(_synthetic, jnp.float32(self.acceptance), made)


def _synthetic(
    acceptance: Array, rule: Verify, key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array
) -> Verdict:
    """Computes a rule's verdict, and replaces it by one that accepts each position with a given probability."""
    verdict = rule(key, draft_tokens, draft_probs, target_probs)
    uniforms = jax.random.uniform(jax.random.fold_in(key, _ACCEPT_STREAM), draft_tokens.shape, jnp.float32)
    return verdict._replace(num_accepted=count_accepted(uniforms < acceptance), num_exact=None)


def groups_of(synthesizer: Synthesizer) -> Callable[[float | None], Groups]:
    """Threshold, None for the synthesizer's own -> the groups of its codes, by the target's embeddings."""
    return lambda threshold: synthesizer.groups(synthesizer.threshold if threshold is None else threshold, "target")


def random_requests(num_codes: int, new_tokens: int, sampling: Sampling) -> Callable[[Case, int], Requests]:
    """Prompts of random codes, each row emitting ``new_tokens``; no id stops it.

    Args:
        num_codes: the first so many ids are codes.
        new_tokens: of each row.
        sampling: of every row.

    Returns:
        (case, number of the repeat) -> its requests.
    """

    def requests(case: Case, repeat: int) -> Requests:
        ids = np.random.default_rng(repeat).integers(0, num_codes, (case.batch, case.prompt)).astype(np.int32)
        length, limit = np.full(case.batch, case.prompt, np.int32), np.full(case.batch, new_tokens, np.int32)
        return Requests(ids, length, new_tokens, limit, (), sampling)

    return requests
