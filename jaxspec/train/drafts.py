"""What is minimised when a draft is trained: a loss at anchors of packed rows, some anchors at a time.

An anchor is the position of a round's last committed token. The target's pass over the rows is computed anew in each step,
without gradient, or read from ``train.features``; its head is applied at the positions after anchors only. No array [B A K V]
exists for all anchors at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxspec.cache import span
from jaxspec.draft.families import FAMILIES
from jaxspec.draft.family import TARGET, Packed, take, with_shared
from jaxspec.draft.family import score as head
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.train.losses import LOSSES, Membership, slot_weights, warp
from jaxspec.types import Array, Params

_Tree = TypeVar("_Tree")


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
    """The initial parameters that are trained, float32 and no arrays of the target; the key is consumed."""
    own = FAMILIES[task.family].init_params(key, task.config, target)
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), own)


def full_params(task: Task, own: Params, target: Params) -> Params:
    """The draft's parameters: its own and those that it shares with the target."""
    return with_shared(own, FAMILIES[task.family].shared(task.config), target)


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
    scored = jax.lax.stop_gradient(score(task, frozen.target, batch))
    params = full_params(task, own, jax.lax.stop_gradient(frozen.target))
    anchor, chosen = choose(batch, task.anchors, key)
    weights = jnp.asarray(slot_weights(task.block, task.gamma))

    def some(anchor: Array, chosen: Array) -> tuple[Array, Array, Array]:
        draft, target, token, counted = slots(task, params, scored, batch, anchor, chosen, task.block)
        log_p, q = warp(draft, target, task.sampling)
        flat = log_p.reshape(-1, log_p.shape[-1]), q.reshape(-1, q.shape[-1]), token.reshape(-1)
        value = LOSSES[task.loss](*flat, frozen.groups).reshape(token.shape)
        accepted = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_p), q).sum(-1))
        return jnp.where(counted, value, 0.0), jnp.where(counted, accepted, 0.0), counted.astype(jnp.float32)

    value, accepted, counted = over_anchors(some, anchor, chosen, anchors_at_once(task, batch, task.block))
    weight = counted * weights[None, None]
    mean = (value * weight).sum() / jnp.maximum(weight.sum(), 1e-6)
    return mean, {"acceptance": accepted.sum() / jnp.maximum(counted.sum(), 1.0)}


def score(task: Task, target: Params, batch: Packed) -> Scored:
    """The target's pass over packed rows [B T], unless their hidden states are known."""
    width = task.config.target.width
    features = hidden_states(task.shape, target, batch) if batch.hidden is None else batch.hidden.astype(task.shape.dtype)
    rest = features[..., :-width]
    return Scored(target, rest if rest.shape[-1] else None, features[..., -width:])


def hidden_states(shape: transformer.Config, target: Params, batch: Packed) -> Array:
    """The hidden states [B T F] that ``shape.feature_layers`` names, of packed rows [B T]."""
    output: Any = transformer.Transformer(shape).apply({"params": target}, batch.tokens, segment=batch.segment)
    return output[1]


def precedes_emitted(batch: Packed) -> Array:
    """Whether an emitted token of the same sequence follows each position: bool [B T]."""
    return jnp.pad(batch.emitted[:, 1:] & (batch.segment[:, 1:] == batch.segment[:, :-1]), ((0, 0), (0, 1)))


def choose(batch: Packed, count: int, key: Array) -> tuple[Array, Array]:
    """Random positions before emitted tokens.

    Args:
        batch: packed rows [B T].
        count: A, of each row; 0: all positions, in order.
        key: consumed.

    Returns:
        int32 [B A], and bool [B A]: false where a row has fewer.
    """
    width, before = batch.tokens.shape[1], precedes_emitted(batch)
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
    family, at = FAMILIES[task.family], span(anchor, length)
    draft = family.logits(task.config, params, batch, scored.features, anchor, length)
    target = head(task.config.target, {TARGET: scored.target}, take(scored.hidden, at))
    segment = take(batch.segment, anchor)[:, :, None]
    inside = at + 1 < batch.tokens.shape[1]
    counted = chosen[:, :, None] & inside & (take(batch.segment, at + 1) == segment) & take(batch.emitted, at + 1)
    token = jnp.where(counted, take(batch.tokens, at + 1), 0)  # ids of a prompt may lie beyond V
    return draft, target, token, counted


def over_anchors(some: Callable[[Array, Array], _Tree], anchor: Array, chosen: Array, at_once: int) -> _Tree:
    """What ``some`` gives, a tree of arrays [B A ...], for ``at_once`` anchors at a time, recomputed for the gradient."""
    batch, count = anchor.shape
    if count <= at_once:
        return some(anchor, chosen)

    def parts(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, -count % at_once))).reshape(batch, -1, at_once).swapaxes(0, 1)

    def join(array: Array) -> Array:
        return array.swapaxes(0, 1).reshape(batch, -1, *array.shape[3:])[:, :count]

    made = jax.lax.map(jax.checkpoint(lambda part: some(*part)), (parts(anchor), parts(chosen)))
    return jax.tree.map(join, made)


def anchors_at_once(task: Task, batch: Packed, length: int) -> int:
    """How many anchors' logits [B A K V] the memory of a task holds."""
    return max(1, task.memory // (4 * len(batch.tokens) * length * task.config.target.vocab))
