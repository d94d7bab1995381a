"""What is minimised when a draft is trained, and how well it would draft: at anchors of packed rows, some anchors at a time.

An anchor is the position of a round's last committed token. The target's pass over the rows is computed anew in each step,
without gradient; its head is applied at the positions after anchors only. No array [B A K V] exists for all anchors at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling as sampling_lib
from jaxspec.common.trees import flatten, unflatten
from jaxspec.draft.families import FAMILIES
from jaxspec.draft.family import Packed, after, take
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.train.losses import LOSSES, Membership, group_variation, slot_weights, warp
from jaxspec.types import Array, Params

_Sums = TypeVar("_Sums")


class Frozen(NamedTuple):
    """Arrays that training reads and does not change: arguments of the compiled program."""

    target: Params
    groups: Membership | None


@dataclasses.dataclass(frozen=True)
class Task:
    """A draft and how it is trained; hashable, so that equal tasks share a compiled program.

    Attributes:
        family: a name in ``FAMILIES``.
        config: the family's Config.
        sampling: the deployment's, without settings that need a history.
        loss: a name in ``LOSSES``.
        block: K.
        gamma: see ``losses.slot_weights``.
        anchors: of each row; 0: all positions.
        memory: bytes of the logits [B A K V] that are computed at once.
    """

    family: str
    config: Any
    sampling: Sampling
    loss: str
    block: int
    gamma: float
    anchors: int
    memory: int

    @property
    def shape(self) -> transformer.Config:
        """The target's shape, with the features that the draft reads and the output of the final norm after them."""
        target = self.config.target
        return dataclasses.replace(target, feature_layers=(*FAMILIES[self.family].feature_layers(self.config), target.layers))


class Scored(NamedTuple):
    """The target, and what it computes of rows: the features that the draft reads [B T F] or None, its last states [B T D]."""

    target: Params
    features: Array | None
    hidden: Array


def own_params(key: Array, task: Task, target: Params) -> Params:
    """The initial parameters that are trained, float32; the key is consumed."""
    own = FAMILIES[task.family].init_params(key, task.config, target)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), own)


def full_params(task: Task, own: Params, target: Params) -> Params:
    """The draft's parameters: its own and those that it shares with the target."""
    theirs = flatten(target)
    shared = {path: theirs[origin] for path, origin in FAMILIES[task.family].shared(task.config).items()}
    return unflatten(flatten(own) | shared)


def loss(task: Task, frozen: Frozen, own: Params, batch: Packed, key: Array) -> tuple[Array, dict[str, Array]]:
    """The mean loss over the slots of random anchors, weighted by ``slot_weights``; and the acceptance of p as it is trained.

    Args:
        task: static.
        frozen: the target and the groups.
        own: the parameters that are trained.
        batch: packed rows [B T].
        key: draws the anchors.

    Returns:
        float32 [] and {"acceptance": 1 - TV(p, q), float32 []}.
    """
    scored = jax.lax.stop_gradient(_score(task, frozen.target, batch))
    params = full_params(task, own, jax.lax.stop_gradient(frozen.target))
    anchor, chosen = choose(batch, task.anchors, key)
    weights = jnp.asarray(slot_weights(task.block, task.gamma))

    def some(anchor: Array, chosen: Array) -> tuple[Array, Array, Array, Array]:
        draft, target, token, counted = slots(task, params, scored, batch, anchor, chosen, task.block)
        log_p, q = warp(draft, target, task.sampling)
        vocab = q.shape[-1]
        flat = log_p.reshape(-1, vocab), q.reshape(-1, vocab), token.reshape(-1)
        value = LOSSES[task.loss](*flat, frozen.groups).reshape(token.shape)
        weight = jnp.where(counted, weights[None, None], 0.0)
        accepted = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_p), q).sum(-1))
        sums = (jnp.where(counted, value, 0.0) * weight, weight, jnp.where(counted, accepted, 0.0), counted.astype(jnp.float32))
        return tuple(part.sum() for part in sums)  # pyright: ignore[reportReturnType]

    value, weight, accepted, count = over_anchors(some, anchor, chosen, _anchors_at_once(task, batch, task.block))
    return value / jnp.maximum(weight, 1e-6), {"acceptance": accepted / jnp.maximum(count, 1.0)}


def _score(task: Task, target: Params, batch: Packed) -> Scored:
    output: Any = transformer.Transformer(task.shape).apply({"params": target}, batch.tokens, segment=batch.segment)
    features, width = output[1], task.config.target.width
    rest = features[..., :-width]
    return Scored(target, rest if rest.shape[-1] else None, features[..., -width:])


def choose(batch: Packed, count: int, key: Array) -> tuple[Array, Array]:
    """Random positions before emitted tokens.

    Args:
        batch: packed rows [B T].
        count: A, of each row; 0: all positions, in order.
        key: consumed.

    Returns:
        int32 [B A], and bool [B A]: false where a row has fewer.
    """
    width = batch.tokens.shape[1]
    before = jnp.pad(batch.emitted[:, 1:] & (batch.segment[:, 1:] == batch.segment[:, :-1]), ((0, 0), (0, 1)))
    if count == 0 or count >= width:
        everywhere = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], before.shape)
        return everywhere, before
    score, anchor = jax.lax.top_k(jnp.where(before, jax.random.uniform(key, before.shape, jnp.float32), -1.0), count)
    return anchor.astype(jnp.int32), score >= 0


def slots(
    task: Task, params: Params, scored: Scored, batch: Packed, anchor: Array, chosen: Array, length: int
) -> tuple[Array, Array, Array, Array]:
    """Draft and target at the slots of some anchors.

    Args:
        task: static.
        params: the draft's full parameters.
        scored: the target's pass over the batch.
        batch: packed rows [B T].
        anchor: int32 [B A].
        chosen: bool [B A].
        length: K.

    Returns:
        the logits of draft and target [B A K V], the tokens int32 [B A K], and which slots count, bool [B A K].
    """
    family, at = FAMILIES[task.family], after(anchor, length)
    draft = family.logits(task.config, params, batch, scored.features, anchor, length)
    hidden = take(scored.hidden, at)
    flat = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    target: Any = transformer.Transformer(task.shape).apply({"params": scored.target}, flat, method="logits")
    segment = jnp.take_along_axis(batch.segment, anchor, axis=1)[:, :, None]
    inside = at + 1 < batch.tokens.shape[1]
    counted = chosen[:, :, None] & inside & (take(batch.segment, at + 1) == segment) & take(batch.emitted, at + 1)
    return draft, target.reshape(*hidden.shape[:3], -1), take(batch.tokens, at + 1), counted


def over_anchors(some: Callable[[Array, Array], _Sums], anchor: Array, chosen: Array, at_once: int) -> _Sums:
    """The sums that ``some`` gives for groups of ``at_once`` anchors, added up; their arrays are recomputed for the gradient."""
    batch, count = anchor.shape
    if count <= at_once:
        return some(anchor, chosen)
    missing = ((0, 0), (0, -count % at_once))

    def parts(array: Array) -> Array:
        return jnp.pad(array, missing).reshape(batch, -1, at_once).swapaxes(0, 1)

    sums = jax.lax.map(jax.checkpoint(lambda part: some(*part)), (parts(anchor), parts(chosen)))
    return jax.tree.map(lambda each: each.sum(0), sums)


def _anchors_at_once(task: Task, batch: Packed, length: int) -> int:
    return max(1, task.memory // (4 * len(batch.tokens) * length * task.config.target.vocab))


class Acceptance(NamedTuple):
    """Sums over anchors, float32 [K], for each position of a proposal: of prefix weights, and of those times the acceptance."""

    weight: Array
    exact: Array
    groups: Array


@functools.partial(jax.jit, static_argnums=(0, 4))
def measure(task: Task, frozen: Frozen, own: Params, batch: Packed, length: int, anchor: Array, chosen: Array) -> Acceptance:
    """How a draft's proposals of K tokens would be accepted, on rows that the target sampled.

    Both distributions are those of the deployment, truncated. The first k drafted tokens are accepted by the exact rule with
    the probability E[prod min(1, p(x_i) / q(x_i)), i <= k] over samples x of the target, so the samples' own tokens are weighted
    by that product; the acceptance of the next position is 1 - TV(p, q), and 1 - TV(P_c, Q_c) on groups.

    Args:
        task: static.
        frozen: the target and the groups.
        own: the draft's own parameters.
        batch: packed rows [B T].
        length: K, static.
        anchor: int32 [B A].
        chosen: bool [B A].

    Returns:
        The sums over all anchors.
    """
    scored, params = _score(task, frozen.target, batch), full_params(task, own, frozen.target)

    def some(anchor: Array, chosen: Array) -> Acceptance:
        draft, target, token, counted = slots(task, params, scored, batch, anchor, chosen, length)
        p, q = (sampling_lib.probabilities(logits, task.sampling) for logits in (draft, target))
        ratio = jnp.minimum(1.0, _at(p, token) / jnp.maximum(_at(q, token), 1e-30))
        before = jnp.pad(jnp.cumprod(ratio, axis=-1)[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
        weight = jnp.where(counted, before, 0.0)
        exact = jnp.minimum(p, q).sum(-1)
        vocab = q.shape[-1]
        if frozen.groups is None:
            grouped = exact
        else:
            log_p = jnp.log(p).reshape(-1, vocab)
            grouped = 1 - group_variation(log_p, q.reshape(-1, vocab), token.reshape(-1), frozen.groups).reshape(exact.shape)
        return Acceptance(*(part.sum((0, 1)) for part in (weight, weight * exact, weight * grouped)))

    return over_anchors(some, anchor, chosen, _anchors_at_once(task, batch, length))


def _at(probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(probs, token[..., None], axis=-1)[..., 0]


def rates(sums: list[Acceptance]) -> Mapping[str, np.ndarray]:
    """The acceptance by position, given that all positions before it were accepted: "exact" and "groups", each [K]."""
    weight, exact, groups = (np.sum([np.asarray(one[i], np.float64) for one in sums], axis=0) for i in range(3))
    weight = np.maximum(weight, 1e-12)
    return {"exact": exact / weight, "groups": groups / weight}


def tokens_per_round(acceptance: np.ndarray) -> np.ndarray:
    """The expected tokens of a round for K = 1 .. len(acceptance), with the correction or bonus token.

    >>> tokens_per_round(np.array([0.5, 0.5])).tolist()
    [1.5, 1.75]
    """
    return 1 + np.cumsum(np.cumprod(acceptance))
