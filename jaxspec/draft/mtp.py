"""Blocks of multi-token prediction: block k reads the outputs of block k - 1, and predicts one position further.

A block is a norm, a projection and a layer of the target's shape, which attends to all positions before. The first reads what the
target's head reads; none reads a token, so that the tokens of a proposal are drawn independently of each other. The head is the
target's, without a norm before it. This is LLaSA+ (github ASLP-lab/LLaSA_Plus), whose own check, that a token is among the
target's 50 likeliest, is replaced by the verifier that the loop is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.draft.drawing import draw_each
from jaxspec.draft.family import (
    Packed,
    before,
    check_length,
    embedding_and_head,
    empty_caches,
    float_shape,
    given,
    last_hidden,
    newest_of,
    score,
    trained_length,
)
from jaxspec.models import transformer
from jaxspec.models.transformer import Layer, Linear, RMSNorm
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal

INPUT_EPS = 1e-6  # of the norm before a block's projection, whatever the target's


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the blocks.

    Attributes:
        target: the target's shape.
        length: the largest K, one block for each.

    Raises:
        ValueError: a length below 1.
    """

    target: transformer.Config
    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"expected a length of 1 or more, got {self.length}: it is the number of blocks")


class MtpDrafter(nn.Module):
    """The first blocks of a drafter."""

    config: Config
    blocks: int

    @nn.compact
    def __call__(
        self, x: Array, position: Array, mask: Array, caches: tuple[kv.KVCache, ...] | None
    ) -> tuple[Array, tuple[kv.KVCache, ...] | None]:
        """Features [B T D] at positions int32 [B T] -> the outputs of each block [B T K D], and the caches."""
        shape = float_shape(self.config.target)
        x, outputs, written = x.astype(shape.dtype), [], []
        for i in range(self.blocks):
            x = RMSNorm(INPUT_EPS, name=f"input_norm_{i}")(x)
            x = Linear(shape.width, ("embed", "embed"), bias=True, name=f"project_{i}")(x)
            x, cache = Layer(shape, name=f"layer_{i}")(x, position, mask, caches[i] if caches else None)
            outputs.append(x)
            written.append(cache)
        return jnp.stack(outputs, axis=2), tuple(written) if caches else None


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Random parameters. The key is consumed."""
    x, position, mask = jnp.zeros((1, 1, config.target.width)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    module = MtpDrafter(config, config.length)
    params: Any = jax.jit(lambda key: nn.meta.unbox(module.init(key, x, position, mask, None)["params"]))(key)
    return params


shared, feature_layers, max_length = embedding_and_head, last_hidden, trained_length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``mtp_draft``."""
    return functools.partial(mtp_draft, config)


@functools.lru_cache
def mtp_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens, by as many blocks; the same arguments give the same object.

    Between rounds it keeps a cache for each block, and their outputs [B K D] at the position that predicted the last token.

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)

    def read(params: Params, features: Array | None, first: Array, caches: tuple[kv.KVCache, ...]) -> tuple[Array, tuple]:
        """The outputs [B T K D] for features [B T D], the first of which has position ``first`` [B]."""
        features = given(features)
        T = features.shape[1]
        position = kv.span(first, T)
        mask = kv.visible(first, T, caches[0].cells)
        return _run(config, draft_length, params, features, position, mask, caches)

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        empty = empty_caches(config.target, draft_length, len(prompt), cells)
        outputs, caches = read(params, features, jnp.zeros_like(prompt_length), empty)
        return newest_of(outputs, prompt_length - 1), caches

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest, caches = state
        outputs, caches = read(params, context.features, context.length - 1 - context.num_fresh, caches)
        newest = newest_of(outputs, context.num_fresh, newest)
        scores = score(config.target, params, newest)
        return draw_each(keys, context, scores), (newest, caches)

    return Draft(draft_length, init, propose)


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor in one pass, see ``family.Family``."""
    segment, position = batch.segment, transformer.positions(batch.segment)
    outputs, _ = _run(config, length, params, features, position, transformer.causal(segment), None)
    return score(config.target, params, before(outputs, anchor, position))


def _run(config: Config, blocks: int, params: Params, *arguments: Any) -> Any:
    return MtpDrafter(config, blocks).apply({"params": params}, *arguments)
