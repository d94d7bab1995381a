"""How a draft's proposals would be accepted, measured on rows that the target sampled: by position, and the tokens of a round.

The exact rule emits the target's samples, whatever the draft. So a row x of the target is one that the loop could have emitted,
and given x, a drafted token at a position was accepted with probability min(1, p(x_i) / q(x_i)): the loop's rounds on a row are a
renewal process with known probabilities, and no decoding is needed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling as sampling_lib
from jaxspec.draft.family import Packed
from jaxspec.train.drafts import Frozen, Task, anchors_at_once, full_params, over_anchors, precedes_emitted, score, slots
from jaxspec.train.losses import variation_on_groups
from jaxspec.types import Array, Params


class Measured(NamedTuple):
    """At the slots of some anchors, each [B A K].

    Attributes:
        ratio: min(1, p(x) / q(x)) at the row's own token x, float32.
        exact: 1 - TV(p, q), the acceptance of the exact rule, float32.
        groups: 1 - TV(P_c, Q_c), that of the coarse-grained rule, float32.
        counted: whether the slot is within the anchor's sequence, bool.
    """

    ratio: Array | np.ndarray
    exact: Array | np.ndarray
    groups: Array | np.ndarray
    counted: Array | np.ndarray


def windows(batch: Packed, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive anchors of each row, from a random position on.

    Args:
        batch: packed rows [B T], on the host.
        count: A; at most T are taken.
        seed: of the positions.

    Returns:
        int32 [B A], and bool [B A]: whether an emitted token follows.
    """
    before = np.asarray(precedes_emitted(batch))
    count, rng = min(count, before.shape[1]), np.random.default_rng(seed)
    spare = np.maximum((np.asarray(batch.segment) > 0).sum(1) - count, 0)
    anchor = rng.integers(spare + 1)[:, None] + np.arange(count)[None]
    return anchor.astype(np.int32), np.take_along_axis(before, anchor, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def measure(
    task: Task, frozen: Frozen, own: Params, batch: Packed, length: int, anchor: Array | np.ndarray, chosen: Array | np.ndarray
) -> Measured:
    """Compares draft and target as they are deployed, both truncated, given that the tokens of the rows are drafted.

    Args:
        task: static.
        frozen: the target and the groups.
        own: the draft's own parameters.
        batch: packed rows [B T].
        length: K, static.
        anchor: int32 [B A].
        chosen: bool [B A].
    """
    scored, params = score(task, frozen.target, batch), full_params(task, own, frozen.target)

    def some(anchor: Array, chosen: Array) -> Measured:
        draft, target, token, counted = slots(task, params, scored, batch, anchor, chosen, length)
        p, q = (sampling_lib.probabilities(logits, task.sampling) for logits in (draft, target))
        ratio = jnp.minimum(1.0, _at(p, token) / jnp.maximum(_at(q, token), 1e-30))
        exact = jnp.minimum(p, q).sum(-1)
        if frozen.groups is None:
            return Measured(ratio, exact, exact, counted)
        grouped = 1 - variation_on_groups((p - q).reshape(-1, p.shape[-1]), frozen.groups).reshape(exact.shape)
        return Measured(ratio, exact, grouped, counted)

    return over_anchors(some, jnp.asarray(anchor), jnp.asarray(chosen), anchors_at_once(task, batch, length))


def _at(probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(probs, token[..., None], axis=-1)[..., 0]


def by_position(parts: Sequence[Measured]) -> Mapping[str, np.ndarray]:
    """The acceptance at each position, given that all positions before it were accepted by the exact rule.

    The first k tokens are accepted with probability E[prod min(1, p(x_i) / q(x_i)), i <= k] over samples x of the target, so each
    row is weighted by that product.

    Returns:
        "exact" and "groups", each float64 [K].
    """
    ratio, exact, groups, counted = _joined(parts)
    before = np.concatenate([np.ones_like(ratio[:, :1]), np.cumprod(ratio, axis=-1)[:, :-1]], axis=1)
    weight = np.where(counted, before, 0.0)
    total = np.maximum(weight.sum(0), 1e-12)
    return {"exact": (weight * exact).sum(0) / total, "groups": (weight * groups).sum(0) / total}


def _joined(parts: Sequence[Measured]) -> list[np.ndarray]:
    """The fields with all anchors in one axis, [N K]."""
    fields = [np.concatenate([np.asarray(part[i]).reshape(-1, part[i].shape[-1]) for part in parts]) for i in range(4)]
    return [*(field.astype(np.float64) for field in fields[:3]), fields[3]]


def tokens_per_round(parts: Sequence[Measured]) -> Mapping[str, np.ndarray]:
    """The tokens of a round for K = 1 .. as many as were measured, over consecutive anchors.

    Rounds begin more often where little is accepted: a mean over all positions would be too large. Each row is followed from
    round to round. On groups, a drafted token is accepted with the mean probability at its position.

    Returns:
        "exact" and "groups", each float64 [K].
    """
    longest = parts[0].ratio.shape[-1]
    found = {}
    for rule, name in (("exact", "ratio"), ("groups", "groups")):
        totals = [
            np.sum([count_rounds(getattr(part, name), part.counted, K) for part in parts], axis=0) for K in range(1, longest + 1)
        ]
        found[rule] = np.array([tokens / max(rounds, 1e-12) for tokens, rounds in totals])
    return found


def count_rounds(accepted: Array | np.ndarray, counted: Array | np.ndarray, length: int) -> tuple[float, float]:
    """The emitted tokens and the expected rounds of rows, after the first K anchors of each, which depend on where it begins.

    Args:
        accepted: [B A K'], the probability that a drafted token is accepted, at the slots of consecutive anchors.
        counted: bool [B A K'], slot 0 is whether the anchor is within a sequence.
        length: K, at most K'.

    >>> half = np.full((1, 100, 1), 0.5)
    >>> tokens, rounds = count_rounds(half, np.ones((1, 100, 1), bool), 1)
    >>> round(tokens / rounds, 2)
    1.5
    """
    chance, inside = np.asarray(accepted, np.float64)[..., :length], np.asarray(counted)[..., 0]
    rows, anchors = inside.shape
    reach = np.concatenate([np.ones((rows, anchors, 1)), np.cumprod(chance, axis=-1)], axis=-1)  # all of the first k accepted
    ends = reach - np.concatenate([reach[..., 1:], np.zeros((rows, anchors, 1))], axis=-1)  # after k accepted tokens
    begins = np.zeros((rows, anchors + length + 1))
    for j in range(anchors):
        first = inside[:, j] & ~inside[:, j - 1] if j else inside[:, j]
        begins[:, j] = np.where(inside[:, j], np.where(first, 1.0, begins[:, j]), 0.0)
        begins[:, j + 1 : j + length + 2] += begins[:, j, None] * ends[:, j]
    skipped = length if anchors > 2 * length else 0
    return float(inside[:, skipped:].sum()), float(begins[:, skipped:anchors].sum())
