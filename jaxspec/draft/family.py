"""What a drafter that is trained for a target consists of; each family is a module of these names.

Training and decoding see the same drafter from two sides. ``drafter`` proposes inside the loop, from a state that is carried from
round to round. ``logits`` gives, in one pass over whole sequences, what it would have proposed after many of their positions, so
that training can compare all of them with the target. A test holds the two together for every family.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec import mesh
from jaxspec.common.trees import flatten, unflatten
from jaxspec.models import transformer
from jaxspec.types import Array, Draft, Params

TARGET = "target"  # where a draft's parameters hold the arrays of its target


class Packed(NamedTuple):
    """Sequences of prompt and emitted tokens, several to a row.

    Attributes:
        tokens: int32 [B T].
        segment: int32 [B T], the same number for the tokens of one sequence, others for its neighbours; 0 is padding.
        emitted: bool [B T], the tokens that the target emitted; prompt and padding are not.
        hidden: the target's hidden states [B T F] where they were computed before, see ``train.features``.
    """

    tokens: Array
    segment: Array
    emitted: Array
    hidden: Array | None = None


class Family(Protocol):
    """A kind of drafter: a module with a dataclass ``Config`` and these functions.

    Parameters are a nested dict. Arrays that are the target's own lie at the paths that ``shared`` gives; the rest are the
    drafter's and are what ``init_params`` makes.
    """

    Config: Any  # a frozen dataclass whose field ``target`` is the target's transformer.Config

    def init_params(self, key: Array, config: Any, target_params: Params) -> Params:
        """The initial parameters of the drafter's own, float32; some families start from the target's. The key is consumed."""
        ...

    def shared(self, config: Any) -> Mapping[str, str]:
        """{path in the draft: path in the target} of the arrays that a draft takes from its target."""
        ...

    def feature_layers(self, config: Any) -> tuple[int, ...]:
        """The hidden states of the target that the drafter reads, see ``transformer.Config``; () for none."""
        ...

    def max_length(self, config: Any) -> int | None:
        """The largest K that it can propose; None: any."""
        ...

    def drafter(self, config: Any) -> Callable[[int], Draft]:
        """K -> the draft that proposes K tokens; equal configs and the same K give the same object."""
        ...

    def logits(self, config: Any, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
        """The logits that the drafter proposes from after each anchor, given that the tokens of the batch are drafted.

        Args:
            config: of the drafter.
            params: of the drafter, with the shared arrays in them.
            batch: sequences [B T].
            features: the target's [B T F], of every position; only those before an anchor may matter to it.
            anchor: int32 [B A], positions in the rows: each stands for the last committed token of a round.
            length: K.

        Returns:
            float32 [B A K V]: row k scores the token at position anchor + 1 + k. Rows beyond the end of the anchor's sequence
            are garbage.
        """
        ...


def on_every_chip(draft: Draft) -> Draft:
    """A small draft, all of which every chip of a mesh computes for its rows, but for what it takes from its target."""
    return Draft(draft.length, mesh.whole(draft.init), mesh.whole(draft.propose))


def target_arrays(target: transformer.Config, *kinds: str) -> dict[str, str]:
    """The target's arrays that a draft shares, by their paths below ``TARGET``.

    Args:
        target: the target's shape.
        kinds: "embed" (the input tables), "head" (the head with its bias; the first table where they are tied) or "norm" (the
            final norm).

    >>> shape = transformer.Config((9, 5), 9, 8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    >>> target_arrays(shape, "head", "norm")
    {'target/head': 'head', 'target/norm/scale': 'norm/scale'}
    """
    tables = [f"table_{i}" for i in range(len(target.input_tables))]
    head = ["table_0" if target.tied else "head"] + ["head_bias"] * target.head_bias
    paths = {"embed": tables, "head": head, "norm": ["norm/scale"]}
    return {f"{TARGET}/{path}": path for kind in kinds for path in paths[kind]}


def embed(target: transformer.Config, params: Params, tokens: Array) -> Array:
    """The target's embeddings [B T D] of tokens int32 [B T], from a draft's parameters."""
    embedded: Any = transformer.Transformer(target).apply({"params": params[TARGET]}, tokens, method="embed")
    return embedded


def score(target: transformer.Config, params: Params, x: Array) -> Array:
    """The logits float32 [B ... V] of normalised hidden states [B ... W], from a draft's parameters.

    They are those of the drafter's own head, ``params["head"]`` [V W], where it has one, else of the target's. Padded rows, and
    the ids that an own head lacks, which are 0 in ``params["proposed"]`` [V], are -inf.
    """
    flat = x.reshape(len(x), -1, x.shape[-1])
    if "head" in params:
        y = _own_logits(params["head"], flat, target.padding)
        y = jnp.where(params["proposed"][None, None] > 0, y, -jnp.inf) if "proposed" in params else y
    else:
        y: Any = transformer.Transformer(target).apply({"params": params[TARGET]}, flat, method="logits")
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _own_logits(head: Array, x: Array, padding: int) -> Array:
    y = jnp.moveaxis(jnp.einsum("vw,btw->vbt", head.astype(x.dtype), x, preferred_element_type=jnp.float32), 0, -1)
    y = mesh.constrain(y, "batch", None, "vocab")
    return jnp.where(jnp.arange(len(head))[None, None] < len(head) - padding, y, -jnp.inf) if padding else y


def embedding_and_head(config: Any) -> Mapping[str, str]:
    """``Family.shared`` of drafters on features: the target's embedding, and its head, without which ``embed`` does not apply."""
    return target_arrays(config.target, "embed", "head")


def trained_length(config: Any) -> int | None:
    """``Family.max_length`` of drafters that are trained for blocks: that of training."""
    return config.length


def configured_reads(config: Any) -> tuple[int, ...]:
    """``Family.feature_layers`` of drafters that choose what they read."""
    return config.reads


def last_hidden(config: Any) -> tuple[int, ...]:
    """``Family.feature_layers`` of drafters that read what the target's head reads."""
    return (config.target.layers,)


def check_reads(reads: tuple[int, ...], length: int) -> None:
    """Raises ValueError for a config without features, or for no tokens."""
    if not reads or length < 1:
        raise ValueError(f"expected features and a length of 1 or more, got {reads} and {length}: give both")


def check_width(target: transformer.Config, width: int, own_head: bool) -> None:
    """Raises ValueError for a drafter that would share the target's head at another width."""
    if not own_head and width != target.width:
        raise ValueError(f"expected the target's width {target.width} for its head, got {width}: set own_head")


def check_length(length: int, longest: int) -> None:
    """Raises ValueError for a K that a drafter was not trained for."""
    if not 1 <= length <= longest:
        raise ValueError(f"expected a draft length from 1 to {longest}, got {length}: it was trained for these")


def given(features: Array | None) -> Array:
    """The features.

    Raises:
        ValueError: there are none.
    """
    if features is None:
        raise ValueError("expected the target's features, got none: build the target with the draft's feature layers")
    return features


def newest_of(rows: Array, count: Array, otherwise: Array | None = None) -> Array:
    """Row count - 1 of rows [B T ...]; where the count [B] is 0, ``otherwise`` [B ...] or zeros.

    In the first round no features are fresh, and a prompt of one token has none that count.
    """
    newest = take(rows, jnp.maximum(count - 1, 0))
    return jnp.where(jnp.expand_dims(count > 0, range(1, newest.ndim)), newest, 0 if otherwise is None else otherwise)


def before(rows: Array, anchor: Array, position: Array) -> Array:
    """The rows [B T ...] at the positions that predicted the anchors int32 [B A]; zeros for the first token of a sequence."""
    newest = take(rows, jnp.maximum(anchor - 1, 0))
    return jnp.where(jnp.expand_dims(take(position, anchor) > 0, range(2, newest.ndim)), newest, 0)


def with_shared(own: Params, shared: Mapping[str, str], target_params: Params) -> Params:
    """A draft's own parameters, and those that are arrays of the target, {path in the draft: path in the target}."""
    theirs = flatten(target_params)
    return unflatten(flatten(own) | {path: theirs[origin] for path, origin in shared.items()})


def empty_caches(shape: transformer.Config, layers: int, batch: int, cells: int) -> tuple[kv.KVCache, ...]:
    """A cache for each of a drafter's layers, all of one shape."""
    return transformer.language_model(dataclasses.replace(shape, layers=layers, feature_layers=())).init_cache(batch, cells)


def write_each(caches: tuple[kv.KVCache, ...], fresh: tuple[kv.KVCache, ...], first: Array) -> tuple[kv.KVCache, ...]:
    """Writes the keys and values of each layer to the cells from ``first`` int32 [B] on."""
    return tuple(kv.write(cache, new, first) for cache, new in zip(caches, fresh, strict=True))


def take(rows: Array, index: Array) -> Array:
    """rows [B T ...] at index int32 [B ...], clipped to the last position: [B ... ...]."""
    batch = jnp.arange(len(rows), dtype=jnp.int32).reshape(-1, *[1] * (index.ndim - 1))
    return rows[batch, jnp.minimum(index, rows.shape[1] - 1)]


def parallel_blocks(batch: Packed, anchor: Array, size: int, bidirectional: bool = False, window: int = 0) -> tuple[Array, Array]:
    """The positions of blocks that begin at anchors and run side by side, and what they see.

    A block sees what comes before its anchor in the anchor's sequence, and itself; blocks do not see each other.

    Args:
        batch: sequences [B T].
        anchor: int32 [B A].
        size: positions of a block.
        bidirectional: whether the positions of a block see those after them too.
        window: how many positions before the anchor are seen; 0 for all.

    Returns:
        int32 [B A*size], and bool [B A*size T+A*size]: the rows of the batch come before the blocks.
    """
    (rows, anchors), index = anchor.shape, jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    seen = take(batch.segment, anchor)[:, :, None] == batch.segment[:, None]
    seen &= index[None, None] < anchor[:, :, None]
    if window:
        seen &= index[None, None] >= anchor[:, :, None] - window
    block, slot = jnp.divmod(jnp.arange(anchors * size, dtype=jnp.int32), size)
    own = (block[:, None] == block[None]) & (bidirectional | (slot[None] <= slot[:, None]))  # [A*size A*size]
    own = jnp.broadcast_to(own[None], (rows, *own.shape))
    position = take(transformer.positions(batch.segment), anchor)
    return kv.span(position, size).reshape(rows, -1), jnp.concatenate([jnp.repeat(seen, size, axis=1), own], axis=2)
