"""A drafter that carries one hidden state from token to token: the target's features, then a small gated MLP for each token.

The state starts from the target's features at the position that predicted the last token. Each step reads the embedding of the
token before it, as the heads of Hydra do (arXiv 2402.05109); its weights are the same in every step. With ``attend``, a layer of
attention over the features of all earlier positions comes first, as in Hydra++.
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
    given,
    newest_of,
    on_every_chip,
    score,
    take,
    trained_length,
)
from jaxspec.models import transformer
from jaxspec.models.transformer import Layer, Linear, RMSNorm
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a recurrent drafter.

    Attributes:
        target: the target's shape.
        reads: the target's hidden states that are its features; (target.layers,) is the one that its head reads.
        length: the largest K, with which it is trained.
        width: of the state.
        mlp_width: hidden width of the gated MLP.
        attend: whether a layer of attention over all features comes first; it has the target's heads.
        own_head: whether it has a head of its own, [V width]; else it shares the target's, and needs the target's width.

    Raises:
        ValueError: no features, a length below 1, or the target's head at another width.
    """

    target: transformer.Config
    reads: tuple[int, ...]
    length: int
    width: int
    mlp_width: int
    attend: bool = False
    own_head: bool = False

    def __post_init__(self) -> None:
        check_reads(self.reads, self.length)
        check_width(self.target, self.width, self.own_head)


class RecurrentDrafter(nn.Module):
    """The drafter's own part; the target's embedding, and its head where it is shared, are applied around it."""

    config: Config

    def setup(self) -> None:
        """Declares the projection of the features, the step and the head."""
        c = self.config
        self.fuse, self.fuse_norm = Linear(c.width, ("embed", "embed")), RMSNorm(c.target.norm_eps)
        if c.attend:
            self.prefix = Layer(layer_shape(c))
        self.token = Linear(c.width, ("embed", "embed"))
        self.token_norm, self.state_norm = RMSNorm(c.target.norm_eps), RMSNorm(c.target.norm_eps)
        self.gate, self.up = (Linear(c.mlp_width, ("embed", "mlp")) for _ in range(2))
        self.down = Linear(c.width, ("mlp", "embed"))
        self.norm = RMSNorm(c.target.norm_eps)
        if c.own_head:
            self.head = self.param("head", nn.initializers.normal(c.width**-0.5), (c.target.vocab, c.width), jnp.float32)

    def start(self, features: Array, position: Array, mask: Array, cache: kv.KVCache | None) -> tuple[Array, kv.KVCache | None]:
        """The states [B T width] that steps start from, of features [B T F] at positions [B T]."""
        x = self.fuse_norm(self.fuse(features.astype(self.config.target.dtype)))
        return self.prefix(x, position, mask, cache) if self.config.attend else (x, cache)

    def step(self, state: Array, token: Array) -> Array:
        """The state [... width] after a token, whose embedding is [... D]."""
        x = jnp.concatenate([self.state_norm(state), self.token_norm(self.token(token))], axis=-1)
        return state + self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def read(self, state: Array) -> Array:
        """What the head reads of states [B ... width]."""
        return self.norm(state)


def layer_shape(config: Config) -> transformer.Config:
    """The shape of the layer of attention."""
    return dataclasses.replace(config.target, width=config.width, mlp_width=config.mlp_width, feature_layers=())


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Random parameters. The key is consumed."""

    def everything(module: RecurrentDrafter) -> Array:
        features = jnp.zeros((1, 1, len(config.reads) * config.target.width))
        state, _ = module.start(features, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool), None)
        return module.read(module.step(state, jnp.zeros((1, 1, config.target.width))))

    params: Any = jax.jit(lambda key: nn.meta.unbox(nn.init(everything, RecurrentDrafter(config))(key)["params"]))(key)
    return params


shared, feature_layers, max_length = embedding_and_head, configured_reads, trained_length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``recurrent_draft``."""
    return functools.partial(recurrent_draft, config)


@functools.lru_cache
def recurrent_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens; the same arguments give the same object.

    Between rounds it keeps the state [B width] of the position that predicted the last token, and the cache of the attention.

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)

    def begin(params: Params, features: Array | None, first: Array, caches: tuple[kv.KVCache, ...]) -> tuple[Array, tuple]:
        """The states [B T width] of features [B T F], the first of which has position ``first`` [B]."""
        features = given(features)
        T = features.shape[1]
        position = kv.span(first, T)
        mask = kv.visible(first, T, caches[0].cells) if caches else jnp.zeros((1, 1, 1), bool)
        states, cache = _run(config, "start", params, features, position, mask, caches[0] if caches else None)
        return states, (cache,) if caches else ()

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        caches = empty_caches(config.target, int(config.attend), len(prompt), cells)
        states, caches = begin(params, features, jnp.zeros_like(prompt_length), caches)
        return newest_of(states, prompt_length - 1), caches

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest, caches = state
        states, caches = begin(params, context.features, context.length - 1 - context.num_fresh, caches)
        newest = newest_of(states, context.num_fresh, newest)

        def step(hidden: Array, previous: Array, i: Array) -> tuple[Array, Array]:
            """The logits of token i, given the one before it, and the state that they are read from."""
            hidden = _run(config, "step", params, hidden, embed(config.target, params, previous[:, None])[:, 0])
            return _score(config, params, hidden), hidden

        return draw_in_turn(keys, context, draft_length, step, newest), (newest, caches)

    return on_every_chip(Draft(draft_length, init, propose))


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor in one pass, see ``family.Family``."""
    position, segment = transformer.positions(batch.segment), batch.segment
    states, _ = _run(config, "start", params, features, position, transformer.causal(segment), None)
    hidden = before(states, anchor, position)  # [B A width]
    scores = []
    for k in range(length):
        hidden = _run(config, "step", params, hidden, embed(config.target, params, take(batch.tokens, anchor + k)))
        scores.append(_score(config, params, hidden))
    return jnp.stack(scores, axis=2)


def _run(config: Config, method: str, params: Params, *arguments: Any) -> Any:
    return RecurrentDrafter(config).apply({"params": params}, *arguments, method=method)


def _score(config: Config, params: Params, hidden: Array) -> Array:
    """The logits float32 [B ... V] of states [B ... width]."""
    return score(config.target, params, _run(config, "read", params, hidden))
