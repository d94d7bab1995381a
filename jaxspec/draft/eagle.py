"""EAGLE-3 as a chain: one layer over the target's features and the tokens after them, which then runs on its own outputs.

The entry at position t joins the features of t with the embedding of token t + 1. For committed positions the features are the
target's; for drafted ones they are the layer's own outputs, in training too (training-time test). arXiv 2503.01840, without the
tree, and with the target's head unless it has its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.draft.drawing import draw
from jaxspec.draft.family import (
    Packed,
    before,
    check_length,
    check_reads,
    configured_reads,
    embed,
    embedding_and_head,
    empty_caches,
    float_shape,
    given,
    newest_of,
    score,
    take,
    trained_length,
)
from jaxspec.models import transformer
from jaxspec.models.transformer import Attention, Linear, RMSNorm, SwiGLU
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of an EAGLE-3 drafter: one layer of the target's shape.

    Attributes:
        target: the target's shape.
        reads: the target's hidden states that are its features; the paper takes a low, a middle and a high one.
        length: the largest K, with which it is trained.
        own_head: whether it has a head of its own, [V D]; else it shares the target's.
        partial_head: whether the own head lacks some of the target's ids, which it never proposes.
        bias: whether queries, keys and values have biases where the target's have.

    Raises:
        ValueError: no features, or a length below 1.
    """

    target: transformer.Config
    reads: tuple[int, ...]
    length: int
    own_head: bool = False
    partial_head: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        check_reads(self.reads, self.length)


class EagleDrafter(nn.Module):
    """The drafter's own part; the target's embedding and head are applied around it."""

    config: Config

    def setup(self) -> None:
        """Declares the projection of the features and the layer."""
        c, target = self.config, self.config.target
        shape = dataclasses.replace(float_shape(target), qkv_bias=target.qkv_bias and c.bias)
        self.fuse = Linear(shape.width, ("embed", "embed"))
        self.embed_norm, self.hidden_norm = RMSNorm(shape.norm_eps), RMSNorm(shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm, self.mlp = RMSNorm(shape.norm_eps), SwiGLU(shape)
        self.norm = RMSNorm(shape.norm_eps)
        if c.own_head:
            self.head = self.param("head", nn.initializers.normal(shape.width**-0.5), (shape.vocab, shape.width), jnp.float32)
        if c.partial_head:
            self.proposed = self.param("proposed", nn.initializers.ones, (shape.vocab,), jnp.float32)

    def project(self, features: Array) -> Array:
        """The target's features [B T F] -> [B T D]."""
        return self.fuse(features.astype(self.config.target.dtype))

    def layer(
        self,
        hidden: Array,
        following: Array,
        position: Array,
        mask: Array,
        cache: kv.KVCache | None = None,
        context: kv.KVCache | None = None,
    ) -> tuple[Array, kv.KVCache]:
        """One pass over entries: hidden [B T D] and embeddings of the tokens after them [B T D] -> ([B T D], keys and values).

        The keys and values are the whole cache where there is one, else those of the entries.
        """
        x = jnp.concatenate([self.embed_norm(following), self.hidden_norm(hidden)], axis=-1)
        y, cache = self.attention(x, position, mask, cache, context)
        out = hidden + y
        out = out + self.mlp(self.mlp_norm(out))
        return out, self.attention.keys_values(x, position) if cache is None else cache

    def read(self, hidden: Array) -> Array:
        """What the head reads of outputs [B ... D]."""
        return self.norm(hidden)


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Random parameters. The key is consumed."""

    def everything(module: EagleDrafter) -> Array:
        width, position, dtype = config.target.width, jnp.zeros((1, 1), jnp.int32), config.target.dtype
        hidden = module.project(jnp.zeros((1, 1, len(config.reads) * width), dtype))
        return module.read(module.layer(hidden, jnp.zeros((1, 1, width), dtype), position, jnp.ones((1, 1, 1), bool))[0])

    params: Any = jax.jit(lambda key: nn.meta.unbox(nn.init(everything, EagleDrafter(config))(key)["params"]))(key)
    return params


shared, feature_layers, max_length = embedding_and_head, configured_reads, trained_length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``eagle_draft``."""
    return functools.partial(eagle_draft, config)


@functools.lru_cache
def eagle_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens; the same arguments give the same object.

    Between rounds it keeps its cache and the output [B D] of the entry that joins the newest features with the last token.

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        (cache,) = empty_caches(config.target, 1, len(prompt), cells)
        outputs, cache = _committed(config, params, prompt, features, jnp.zeros_like(prompt_length), cache)
        return newest_of(outputs, prompt_length - 1), cache

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest, cache = state
        first = context.length - 1 - context.num_fresh
        outputs, cache = _committed(config, params, context.tokens, context.features, first, cache)
        newest = newest_of(outputs, context.num_fresh, newest)

        def sample(hidden: Array, tokens: Array, i: Array) -> tuple[Array, Array, Array]:
            """Token i of the proposal, from the output of its entry."""
            return draw(keys, _score(config, params, hidden), tokens, context, i)

        def propose_one(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
            """Runs the layer on its own output and the token before, and samples token i."""
            hidden, previous, tokens, *cells = carry
            at, cache = context.length - 2 + i, kv.KVCache(*cells)
            following = embed(config.target, params, previous[:, None])
            entry = (hidden[:, None], following, at[:, None], kv.visible(at, 1, cache.cells), cache)
            output, cache = _run(config, "layer", params, *entry)
            token, probs, tokens = sample(output[:, 0], tokens, i)
            return (output[:, 0], token, tokens, *cache), (token, probs)

        token, probs, tokens = sample(newest, context.tokens, jnp.int32(0))
        slots = jnp.arange(1, draft_length, dtype=jnp.int32)
        (*_, key, value), (more, more_probs) = jax.lax.scan(propose_one, (newest, token, tokens, *cache), slots)
        tokens = jnp.concatenate([token[:, None], more.T], axis=1)
        probs = jnp.concatenate([probs[:, None], more_probs.swapaxes(0, 1)], axis=1)
        return Proposal(tokens, probs), (newest, kv.KVCache(key, value))

    return Draft(draft_length, init, propose)


def _committed(
    config: Config, params: Params, tokens: Array, features: Array | None, first: Array, cache: kv.KVCache
) -> tuple[Array, kv.KVCache]:
    """The outputs [B T D] of the entries with the target's features [B T F], the first of which has position ``first`` [B]."""
    features = given(features)
    T = features.shape[1]
    position = kv.span(first, T)
    following = embed(config.target, params, take(tokens, position + 1))
    mask = kv.visible(first, T, cache.cells)
    outputs: tuple[Array, kv.KVCache] = _run(
        config, "layer", params, _run(config, "project", params, features), following, position, mask, cache
    )
    return outputs


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor, the layer rerun on its own outputs for each further token, see ``family.Family``."""
    segment, position = batch.segment, transformer.positions(batch.segment)
    index = jnp.arange(segment.shape[1], dtype=jnp.int32)
    embedded = embed(config.target, params, batch.tokens)
    following = jnp.pad(embedded[:, 1:], ((0, 0), (0, 1), (0, 0)))
    hidden, mask = _run(config, "project", params, features), transformer.causal(segment)
    outputs, seen = _run(config, "layer", params, hidden, following, position, mask)
    hidden = before(outputs, anchor, position)
    same = take(segment, anchor)[:, :, None] == segment[:, None]
    mask, own = same & (index[None, None] < anchor[:, :, None]), jnp.eye(anchor.shape[1], dtype=bool)[None]
    scores = [_score(config, params, hidden)]
    for k in range(1, length):
        mask = jnp.concatenate([mask, jnp.broadcast_to(own, (len(anchor), *own.shape[1:]))], axis=2)
        at = take(position, anchor) - 1 + k
        hidden, fresh = _run(config, "layer", params, hidden, take(embedded, anchor + k), at, mask, None, seen)
        seen = kv.join(seen, fresh)
        scores.append(_score(config, params, hidden))
    return jnp.stack(scores, axis=2)


def _run(config: Config, method: str, params: Params, *arguments: Any) -> Any:
    return EagleDrafter(config).apply({"params": params}, *arguments, method=method)


def _score(config: Config, params: Params, hidden: Array) -> Array:
    """The logits float32 [B ... V] of the layer's outputs [B ... D]."""
    return score(config.target, params, _run(config, "read", params, hidden))
