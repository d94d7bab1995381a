"""Losses of a draft at single positions: functions of its distribution, of the target's, and of the target's token.

p is the draft's distribution and q the target's. The exact rule accepts with probability 1 - TV(p, q), and the coarse-grained
one with 1 - TV(P_c, Q_c), the distributions of the groups. q is the deployment's distribution, truncated as it samples; p has the
same temperature and is not truncated, as a token outside of a truncated p has no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling as sampling_lib
from jaxspec.groups import Groups
from jaxspec.sampling import Sampling
from jaxspec.types import Array

_ENTRIES = 2**24  # of groups times rows that are in memory at once


class Membership(NamedTuple):
    """Which tokens are in which groups: the non-zero weights w[k, t] = 1 / |S(t)| of PCG, in the order of the groups.

    Attributes:
        token: int32 [N].
        group: int32 [N], ascending.
        weight: float32 [N].
        groups: int32 [M], only its length counts.
    """

    token: Array
    group: Array
    weight: Array
    groups: Array


Loss = Callable[[Array, Array, Array, Membership | None], Array]  # (log p [R V], q [R V], token [R], groups) -> [R]


def membership(groups: Groups) -> Membership:
    """The sparse matrix of the groups, on the host's and then on the default device."""
    members, sizes, count = (np.asarray(field) for field in (groups.members, groups.sizes, groups.token_count))
    token = members[np.arange(members.shape[1]) < sizes[:, None]]
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    arrays = token.astype(np.int32), group, (1 / count[token]).astype(np.float32), np.zeros(len(sizes), np.int32)
    return Membership(*jax.device_put(arrays))


def deployed(sampling: Sampling) -> Sampling:
    """The settings that a loss follows: temperature, top-k, top-p and min-p; those that need a history are left out."""
    return Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def warp(draft: Array, target: Array, sampling: Sampling) -> tuple[Array, Array]:
    """log p and q from logits.

    Args:
        draft: logits [... V].
        target: logits [... V].
        sampling: of the deployment, without settings that need a history, see ``deployed``.

    Returns:
        log p float32 [... V], at the temperature (at 1 where decoding is greedy) and not truncated; q float32 [... V] as sampled.
    """
    log_p = jax.nn.log_softmax(draft.astype(jnp.float32) / np.float32(sampling.temperature or 1.0))
    return log_p, sampling_lib.probabilities(target, sampling)


def cross_entropy(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """-log p of the target's token: float32 [R].

    >>> round(float(cross_entropy(jnp.log(jnp.array([[0.25, 0.75]])), jnp.ones((1, 2)), jnp.array([0]))[0]), 4)
    1.3863
    """
    return -jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]


def divergence(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """The Kullback-Leibler divergence KL(q || p): float32 [R]."""
    here = q > 0
    terms = q * (jnp.log(jnp.where(here, q, 1.0)) - jnp.where(here, log_p, 0.0))
    return jnp.where(here, terms, 0.0).sum(-1)


def total_variation(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """TV(p, q) = sum |p - q| / 2: float32 [R].

    >>> round(float(total_variation(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([[0.5, 0.5]]), jnp.array([0]))[0]), 4)
    0.25
    """
    return jnp.abs(jnp.exp(log_p) - q).sum(-1) / 2


def lk(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """lambda KL + (1 - lambda) TV, lambda = exp(-3 acceptance) without gradient (LK losses, arXiv 2602.23881): float32 [R].

    The gradient of TV vanishes where p and q hardly overlap, so it begins with KL and passes to TV as acceptance grows.
    """
    variation = total_variation(log_p, q, token)
    share = jax.lax.stop_gradient(jnp.exp(-3 * (1 - variation)))
    return share * divergence(log_p, q, token) + (1 - share) * variation


def mixed(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """0.1 cross-entropy + 0.9 TV, up to a factor the loss of DSpark (arXiv 2607.05147): float32 [R]."""
    return 0.1 * cross_entropy(log_p, q, token) + 0.9 * total_variation(log_p, q, token)


def group_variation(log_p: Array, q: Array, token: Array, groups: Membership | None = None) -> Array:
    """TV(P_c, Q_c), 1 - the acceptance of the coarse-grained rule, with P_c(k) = sum over t of w[k, t] p(t): float32 [R].

    Raises:
        ValueError: there are no groups.
    """
    if groups is None:
        raise ValueError("expected groups for the loss group, got none: pass their membership")
    return variation_on_groups(jnp.exp(log_p) - q, groups)


def variation_on_groups(difference: Array, groups: Membership) -> Array:
    """TV(P_c, Q_c) from p - q [R V], some rows at a time: float32 [R]."""
    rows, vocab = difference.shape
    at_once = max(1, min(rows, _ENTRIES // groups.token.shape[0]))
    padded = jnp.pad(difference, ((0, -rows % at_once), (0, 0))).reshape(-1, at_once, vocab)

    @jax.checkpoint
    def some(part: Array) -> Array:
        weighted = part.T[groups.token] * groups.weight[:, None]  # [N rows]: whole rows are gathered and added
        mass = jax.ops.segment_sum(weighted, groups.group, groups.groups.shape[0], indices_are_sorted=True)
        return jnp.abs(mass).sum(0) / 2

    return jax.lax.map(some, padded).reshape(-1)[:rows]


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "kl": divergence,
    "tv": total_variation,
    "lk": lk,
    "ce+tv": mixed,
    "group": group_variation,
}
ON_GROUPS = ("group",)


def slot_weights(length: int, gamma: float) -> np.ndarray:
    """The weight exp(-k / gamma) of each slot of a block, float32 [K]; equal weights for gamma 0.

    >>> slot_weights(3, 0.0).tolist()
    [1.0, 1.0, 1.0]
    """
    return np.exp(-np.arange(length) / gamma if gamma else np.zeros(length)).astype(np.float32)
