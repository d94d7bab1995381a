"""A drafter that proposes a whole block from the target's features: one parallel pass, then a tiny sequential head.

The features of the committed positions are keys and values in every layer of the drafter. The queries are the last token and a
mask token for each further position. Their outputs give base logits for the whole block at once; a low-rank Markov head then adds
what the token drafted just before says. Architecture: DFlash (arXiv 2602.06036) and DSpark (arXiv 2607.05147, sampled from the
anchor on), with two changes. A position attends to those before it only, so that the first K of a block are the same for every K;
and the newest features are added to every query, so that a drafter of one layer need not find them by attention. The last fields
of ``Config`` undo both, for the drafters that others published.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.draft.drawing import draw_in_turn
from jaxspec.draft.family import (
    Packed,
    before,
    check_length,
    check_reads,
    check_width,
    configured_reads,
    embed,
    embedding_and_head,
    empty_caches,
    float_shape,
    given,
    newest_of,
    parallel_blocks,
    score,
    take,
    trained_length,
    write_each,
)
from jaxspec.models import transformer
from jaxspec.models.int8 import dequantize
from jaxspec.models.transformer import Layer, Linear, RMSNorm
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a block drafter.

    Attributes:
        target: the target's shape.
        reads: the target's hidden states that are its features, see ``transformer.Config.feature_layers``.
        length: the largest K, with which it is trained.
        layers, width, heads, kv_heads, head_dim, mlp_width: of its transformer.
        markov_rank: of the Markov head; 0 is none.
        markov_top: the Markov head corrects only the logits that are this high in the base's order; 0 corrects all. For large V.
        own_head: whether it has a head of its own, [V width]; else it shares the target's, and needs the target's width.
        partial_head: whether the own head lacks some of the target's ids, which it never proposes.
        hint: whether the newest features are added to the queries.
        bidirectional: whether the positions of a block see each other both ways; then the block of ``length`` is computed whole
            for every K.
        from_anchor: whether the output at the last token scores the first of the proposal; else that of the mask after it does.
        window: how many positions before the last token are seen; 0 for all.
        qwen3: whether the layers are those of Qwen 3 (norms of queries and keys, no biases), whatever the target's.
        rope_theta: of the layers; 0 for the target's.

    Raises:
        ValueError: no features, a length below 1, or the target's head at another width.
    """

    target: transformer.Config
    reads: tuple[int, ...]
    length: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    markov_rank: int = 256
    markov_top: int = 0
    own_head: bool = False
    partial_head: bool = False
    hint: bool = True
    bidirectional: bool = False
    from_anchor: bool = True
    window: int = 0
    qwen3: bool = False
    rope_theta: float = 0.0

    def __post_init__(self) -> None:
        check_reads(self.reads, self.length)
        check_width(self.target, self.width, self.own_head)


def shape(config: Config) -> transformer.Config:
    """The shape of the drafter's layers."""
    own = {name: getattr(config, name) for name in ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")}
    own |= {"qkv_bias": False, "qk_norm": True} if config.qwen3 else {}
    own |= {"rope_theta": config.rope_theta, "rope_scaling": None} if config.rope_theta else {}
    return dataclasses.replace(float_shape(config.target), **own)


def _queries(config: Config, length: int) -> int:
    """How many queries propose ``length`` tokens."""
    return (config.length if config.bidirectional else length) + (not config.from_anchor)


def _scored(config: Config, x: Array, length: int) -> Array:
    """Of the outputs of blocks [... queries width], those that score the proposal [... K width]."""
    first = 0 if config.from_anchor else 1
    return x[..., first : first + length, :]


class BlockDrafter(nn.Module):
    """The drafter's own part; the target's embedding, and its head where it is shared, are applied around it."""

    config: Config

    def setup(self) -> None:
        """Declares the projection of the features, the layers and the heads."""
        c, normal, V = self.config, nn.initializers.normal, self.config.target.vocab
        self.fuse, self.fuse_norm = Linear(c.width, ("embed", "embed")), RMSNorm(c.target.norm_eps)
        if c.hint:
            self.newest = Linear(c.width, ("embed", "embed"))
        self.narrow = Linear(c.width, ("embed", "embed")) if c.width != c.target.width else None
        self.mask = self.param("mask", normal(c.width**-0.5), (c.width,), jnp.float32)
        self.stack = [Layer(shape(c), name=f"layer_{i}") for i in range(c.layers)]
        self.norm = RMSNorm(c.target.norm_eps)
        if c.own_head:
            self.head = self.param("head", normal(c.width**-0.5), (V, c.width), jnp.float32)
        if c.partial_head:
            self.proposed = self.param("proposed", nn.initializers.ones, (V,), jnp.float32)
        if c.markov_rank:
            self.previous = self.param("markov_previous", normal(c.markov_rank**-0.5), (V, c.markov_rank), jnp.float32)
            self.following = self.param("markov_following", nn.initializers.zeros, (V, c.markov_rank), jnp.float32)

    def context(self, features: Array, position: Array) -> tuple[Array, tuple[kv.KVCache, ...]]:
        """Features [B T F] at positions int32 [B T], fused [B T width], and their keys and values for each layer."""
        fused = self.fuse_norm(self.fuse(features.astype(self.config.target.dtype)))
        return fused, tuple(layer.keys_values(fused, position) for layer in self.stack)

    def queries(self, last: Array, newest: Array, block: int) -> Array:
        """What the layers read at the positions of some blocks.

        Args:
            last: embeddings of the last tokens [B A D].
            newest: fused features of the positions that predicted them [B A width].
            block: T.

        Returns:
            [B A*T width].
        """
        first = last if self.narrow is None else self.narrow(last)
        mask = jnp.expand_dims(self.mask.astype(first.dtype), (0, 1, 2))
        mask = jnp.broadcast_to(mask, (*first.shape[:2], block - 1, first.shape[-1]))
        x = jnp.concatenate([first[:, :, None], mask], axis=2)
        x = x + self.newest(newest)[:, :, None] if self.config.hint else x
        return x.reshape(len(first), -1, first.shape[-1])

    def decode(
        self, x: Array, position: Array, mask: Array, caches: tuple[kv.KVCache, ...]
    ) -> tuple[Array, tuple[kv.KVCache, ...]]:
        """Runs the layers over queries [B T width], whose keys and values go into the caches."""
        written = []
        for layer, cache in zip(self.stack, caches, strict=True):
            x, cache = layer(x, position, mask, cache)
            written.append(cache)
        return self.norm(x), tuple(written)

    def train(self, x: Array, position: Array, mask: Array, contexts: tuple[kv.KVCache, ...]) -> Array:
        """Runs the layers over queries [B T width], with the keys and values of ``contexts`` before their own."""
        for layer, context in zip(self.stack, contexts, strict=True):
            x, _ = layer(x, position, mask, None, context)
        return self.norm(x)

    def markov(self, logits: Array, previous: Array) -> Array:
        """Adds what the token before says: logits [... V], the token drafted or committed before int32 [...] -> [... V]."""
        c = self.config
        if not c.markov_rank:
            return logits
        row = self.previous[jnp.minimum(previous, c.target.vocab - 1)]  # a prompt may end in an id that is only in the tables
        if not c.markov_top:
            return logits + jnp.einsum("...r,vr->...v", row, self.following, preferred_element_type=jnp.float32)
        _, top = jax.lax.top_k(logits, c.markov_top)
        added = jnp.einsum("...r,...mr->...m", row, self.following[top], preferred_element_type=jnp.float32)
        return jnp.put_along_axis(logits, top, jnp.take_along_axis(logits, top, axis=-1) + added, axis=-1, inplace=False)


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Random parameters, and the target's last layers where the drafter's have their shape. The key is consumed.

    The Markov head corrects nothing yet.
    """

    def everything(module: BlockDrafter) -> tuple[Array, Array]:
        position, width, dtype = jnp.zeros((1, 2), jnp.int32), config.target.width, config.target.dtype
        fused, contexts = module.context(jnp.zeros((1, 2, len(config.reads) * width), dtype), position)
        queries = module.queries(jnp.zeros((1, 1, width), dtype), fused[:, :1], 2)
        x = module.train(queries, position, jnp.ones((1, 2, 4), bool), contexts)
        return x, module.markov(jnp.zeros((1, 2, config.target.vocab), jnp.float32), position)

    params: Any = jax.jit(lambda key: nn.meta.unbox(nn.init(everything, BlockDrafter(config))(key)["params"]))(key)
    if shape(config) == dataclasses.replace(float_shape(config.target), layers=config.layers):
        first = config.target.layers - config.layers
        params |= {f"layer_{i}": dequantize(target_params[f"layer_{first + i}"]) for i in range(config.layers)}
        params |= {"norm": target_params["norm"]}
    return params


shared, feature_layers, max_length = embedding_and_head, configured_reads, trained_length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``block_draft``."""
    return functools.partial(block_draft, config)


@functools.lru_cache
def block_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens; the same arguments give the same object.

    Between rounds it keeps the newest fused features [B width] and its caches. The cells below a row's last token hold keys and
    values of features. Those of the block follow from the last token's on, and are overwritten by features once these are known.

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)
    block = _queries(config, draft_length)

    def run(method: str, params: Params, *arguments: Any) -> Any:
        return BlockDrafter(config).apply({"params": params}, *arguments, method=method)

    def read(params: Params, features: Array | None, first: Array, caches: tuple[kv.KVCache, ...]) -> tuple[Array, tuple]:
        """Fuses features [B T F], the first of which has position ``first`` [B], and writes their keys and values."""
        features = given(features)
        fused, fresh = run("context", params, features, kv.span(first, features.shape[1]))
        return fused, write_each(caches, fresh, first)

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        empty = empty_caches(shape(config), config.layers, len(prompt), cells + block - draft_length)
        fused, caches = read(params, features, jnp.zeros_like(prompt_length), empty)
        return newest_of(fused, prompt_length - 1), caches

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest, caches = state
        last = context.length - 1
        fused, caches = read(params, context.features, last - context.num_fresh, caches)
        newest = newest_of(fused, context.num_fresh, newest)
        embedded = embed(config.target, params, context.last[:, None])
        x = run("queries", params, embedded, newest[:, None], block)
        cells = caches[0].cells
        mask = kv.visible(last + block - 1, 1, cells) if config.bidirectional else kv.visible(last, block, cells)
        if config.window:
            mask &= jnp.arange(cells, dtype=jnp.int32)[None, None] >= (last - config.window)[:, None, None]
        x, caches = run("decode", params, x, kv.span(last, block), mask, caches)
        base = score(config.target, params, _scored(config, x, draft_length))

        def corrected(carry: tuple[()], previous: Array, i: Array) -> tuple[Array, tuple[()]]:
            """The logits of token i, given the one before it."""
            return run("markov", params, jax.lax.dynamic_index_in_dim(base, i, axis=1, keepdims=False), previous), carry

        return draw_in_turn(keys, context, draft_length, corrected, ()), (newest, caches)

    return Draft(draft_length, init, propose)


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor in one pass, see ``family.Family``: blocks do not see each other."""

    def run(method: str, *arguments: Any) -> Any:
        return BlockDrafter(config).apply({"params": params}, *arguments, method=method)

    size, position = _queries(config, length), transformer.positions(batch.segment)
    place, mask = parallel_blocks(batch, anchor, size, config.bidirectional, config.window)
    fused, contexts = run("context", features, position)
    x = run("queries", embed(config.target, params, take(batch.tokens, anchor)), before(fused, anchor, position), size)
    x = run("train", x, place, mask, contexts).reshape(*anchor.shape, size, -1)
    base = score(config.target, params, _scored(config, x, length))
    return run("markov", base, take(batch.tokens, kv.span(anchor, length)))
