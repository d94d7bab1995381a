"""How near the tokens that a rule emits are to those that the exact rule emits from the same proposals and random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxspec.codec import fsq
from jaxspec.models.builtin import CODES, LEVELS
from jaxspec.types import Array, KeyLike, Verify
from jaxspec.verify.exact import exact


class Fidelity(NamedTuple):
    """Of accepted codes, the fraction that the exact rule emits too, and the mean distance to its codes, in levels of a digit."""

    same: float
    distance: float


def fidelity(verify: Verify, steps: Sequence[tuple[np.ndarray, np.ndarray]], draws: int = 16, seed: int = 0) -> Fidelity:
    """Verifies single steps of the built-in voice by a rule and by the exact rule, with the same drafts and keys.

    Args:
        verify: the rule.
        steps: p and q of some steps, each [V], see ``optimal.steps``.
        draws: from each step.
        seed: of the drafted tokens and of the rules' keys.

    Returns:
        The means over all draws whose code the rule accepts; (1, 0) where it accepts none. Steps at which either rule ends the
        speech have no distance.

    Raises:
        ValueError: there are no steps.
    """
    if not steps:
        raise ValueError("expected one step or more, got none: take them from optimal.steps")
    keys = jax.random.split(jax.random.key(seed), (len(steps), draws))
    p, q = (np.stack(some).astype(np.float32) for some in zip(*steps, strict=True))
    (ours, accepted), (theirs, _) = (jax.tree.map(np.ravel, _emitted(rule, keys, p, q)) for rule in (verify, exact()))
    ours, theirs = ours[accepted], theirs[accepted]
    codes = (ours < CODES) & (theirs < CODES)
    ours_digits, theirs_digits = (np.asarray(fsq.to_digits(jnp.asarray(some[codes]), LEVELS)) for some in (ours, theirs))
    moved = np.abs(ours_digits.astype(int) - theirs_digits.astype(int)).sum(-1)
    return Fidelity(float((ours == theirs).mean()) if accepted.any() else 1.0, float(moved.mean()) if codes.any() else 0.0)


@jax.jit
def _emitted(
    verify: Verify, keys: KeyLike, p: Float[Array, "N V"], q: Float[Array, "N V"]
) -> tuple[Int[Array, "N D"], Bool[Array, "N D"]]:
    """The first token that a rule emits, for each key, and whether it is the drafted one."""

    def one(key: KeyLike, p: Float[Array, " V"], q: Float[Array, " V"]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        draft_key, rule_key = jax.random.split(key)
        drafted = jax.random.categorical(draft_key, jnp.log(p)).astype(jnp.int32)
        verdict = verify(rule_key, drafted[None], p[None], jnp.stack([q, q]))
        accepted = verdict.num_accepted > 0
        return jnp.where(accepted, drafted, verdict.token), accepted

    return jax.vmap(lambda keys, p, q: jax.lax.map(lambda key: one(key, p, q), keys))(keys, p, q)
