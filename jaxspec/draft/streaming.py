"""A drafter made of the target's own last layers: streams, one for each token of the proposal, run through them beside its cache.

Stream k begins as the hidden state below these layers at the position that predicted the last token, plus a low-rank function
of it and of the last token, plus an embedding of its own. In each layer it attends to the target's keys and values of the
committed positions and to the streams before it; a low-rank adapter follows the layer. The target is frozen.

This is Speculative Streaming in its lossless mode (arXiv 2402.11131), as a chain, with one change: there the streams of every
candidate run within the pass that verifies it, K (K + 1) in all; here those of the position that was kept run after it, K in
all. The target's keys and values are computed again from its hidden states, so that no model needs to know of streams. Tokens
are drawn independently of each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.common.trees import flatten
from jaxspec.draft.drawing import draw_each
from jaxspec.draft.family import (
    TARGET,
    Packed,
    before,
    check_length,
    embed,
    empty_caches,
    given,
    newest_of,
    parallel_blocks,
    score,
    take,
    target_arrays,
    trained_length,
    write_each,
)
from jaxspec.models import transformer
from jaxspec.models.transformer import Layer, RMSNorm
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the streams.

    Attributes:
        target: the target's shape.
        length: the largest K, one stream for each token.
        layers: N_s, the target's last layers that the streams run through.
        rank: of the adapters.

    Raises:
        ValueError: a length or rank below 1, or as many layers as the target has.
    """

    target: transformer.Config
    length: int
    layers: int
    rank: int = 64

    def __post_init__(self) -> None:
        if min(self.length, self.rank) < 1 or not 1 <= self.layers < self.target.layers:
            raise ValueError(
                f"expected a length and a rank of 1 or more and 1 to {self.target.layers - 1} layers, got {self.length}, "
                f"{self.rank} and {self.layers}: change the recipe"
            )


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Streams that differ by their embeddings alone: the adapters change nothing yet. The key is consumed."""
    streams, first, *rest = jax.random.split(key, config.layers + 2)
    width, rank = config.target.width, config.rank

    def adapter(key: Array, inputs: int) -> Params:
        down = jax.random.normal(key, (inputs, rank), jnp.float32) * inputs**-0.5
        return {"down": down, "up": jnp.zeros((rank, width), jnp.float32)}

    embedding = jax.random.normal(streams, (config.length, width), jnp.float32) * width**-0.5
    adapters = {f"adapter_{i}": adapter(key, width) for i, key in enumerate(rest)}
    return {"streams": embedding, "first": adapter(first, 2 * width), **adapters}


def shared(config: Config) -> Mapping[str, str]:
    """The target's embedding, its last layers, its final norm and its head."""
    layers = {name: leaf for name, leaf in transformer.abstract_params(config.target).items() if name in _names(config)}
    return target_arrays(config.target, "embed", "norm", "head") | {f"{TARGET}/{path}": path for path in flatten(layers)}


def feature_layers(config: Config) -> tuple[int, ...]:
    """What each of the last layers reads."""
    return tuple(i - 1 for i in _layers(config))


max_length = trained_length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``streaming_draft``."""
    return functools.partial(streaming_draft, config)


@functools.lru_cache
def streaming_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens; the same arguments give the same object.

    Between rounds it keeps the newest hidden state [B D] below its layers, and their caches, laid out as those of ``block``.

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)

    def read(params: Params, features: Array | None, first: Array, caches: tuple[kv.KVCache, ...]) -> tuple[Array, tuple]:
        """Writes the keys and values of features [B T F], the first of which has position ``first`` [B]."""
        features = given(features)
        fresh = _keys_values(config, params, features, kv.span(first, features.shape[1]))
        below = features[..., : config.target.width]
        return below, write_each(caches, fresh, first)

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        empty = empty_caches(config.target, config.layers, len(prompt), cells)
        below, caches = read(params, features, jnp.zeros_like(prompt_length), empty)
        return newest_of(below, prompt_length - 1), caches

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest, caches = state
        last = context.length - 1
        below, caches = read(params, context.features, last - context.num_fresh, caches)
        newest = newest_of(below, context.num_fresh, newest)
        x = _begin(config, params, newest[:, None], context.last[:, None], draft_length)[:, 0]
        mask = kv.visible(last, draft_length, caches[0].cells)
        x, caches = _run(config, params, x, kv.span(last, draft_length), mask, caches, (None,) * config.layers)
        return draw_each(keys, context, score(config.target, params, x)), (newest, caches)

    return Draft(draft_length, init, propose)


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor in one pass, see ``family.Family``."""
    features, position = given(features), transformer.positions(batch.segment)
    below = before(features[..., : config.target.width], anchor, position)
    x = _begin(config, params, below, take(batch.tokens, anchor), length)
    place, mask = parallel_blocks(batch, anchor, length)
    contexts = _keys_values(config, params, features, position)
    flat = x.reshape(len(x), -1, x.shape[-1])
    x = _run(config, params, flat, place, mask, (None,) * config.layers, contexts)[0].reshape(x.shape)
    return score(config.target, params, x)


def _layers(config: Config) -> range:
    return range(config.target.layers - config.layers, config.target.layers)


def _names(config: Config) -> list[str]:
    return [f"layer_{i}" for i in _layers(config)]


def _layer(config: Config) -> Layer:
    return Layer(dataclasses.replace(config.target, feature_layers=()))


def _adapt(params: Params, x: Array) -> Array:
    """x [... in] -> [... D], of low rank."""
    return (x @ params["down"].astype(x.dtype)) @ params["up"].astype(x.dtype)


def _begin(config: Config, params: Params, below: Array, last: Array, length: int) -> Array:
    """The streams' first states [B A K D], from the hidden states below the layers [B A D] and the last tokens int32 [B A]."""
    below = below.astype(config.target.dtype)
    x = below + _adapt(params["first"], jnp.concatenate([below, embed(config.target, params, last)], axis=-1))
    return x[:, :, None] + jnp.expand_dims(params["streams"][:length].astype(x.dtype), (0, 1))


def _keys_values(config: Config, params: Params, features: Array, position: Array) -> tuple[kv.KVCache, ...]:
    """The target's keys and values in each of its last layers, from what these read [B T N_s*D]."""

    def of(layer: Layer, x: Array) -> kv.KVCache:
        return layer.keys_values(layer.attention_norm(x), position)

    states = jnp.split(features.astype(config.target.dtype), config.layers, axis=-1)
    made: Any = (
        _layer(config).apply({"params": params[TARGET][name]}, x, method=of)
        for name, x in zip(_names(config), states, strict=True)
    )
    return tuple(made)


def _run(
    config: Config, params: Params, x: Array, position: Array, mask: Array, caches: tuple[Any, ...], contexts: tuple[Any, ...]
) -> tuple[Array, tuple[Any, ...]]:
    """Runs streams [B T D] through the layers and the final norm, with keys and values in caches or before their own."""
    written = []
    for i, (name, cache, context) in enumerate(zip(_names(config), caches, contexts, strict=True)):
        output: Any = _layer(config).apply({"params": params[TARGET][name]}, x, position, mask, cache, context)
        x = output[0] + _adapt(params[f"adapter_{i}"], output[0])
        written.append(output[1])
    normed: Any = RMSNorm(config.target.norm_eps).apply({"params": params[TARGET]["norm"]}, x)
    return normed, tuple(written)
