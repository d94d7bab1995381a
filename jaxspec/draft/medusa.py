"""The simplest drafter on the target's features: one residual block for each position of the proposal, blind to the others.

Block k is h + silu(h W_k) on the hidden state that predicted the last token, and the head is the target's (Medusa, arXiv
2401.10774, whose heads have weights of their own). Its tokens are drawn independently of each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxspec.draft.drawing import draw
from jaxspec.draft.family import Packed, before, check_length, given, newest_of, score, target_arrays
from jaxspec.models import transformer
from jaxspec.types import Array, Context, Draft, DraftState, Params, Proposal


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of Medusa's heads.

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
            raise ValueError(f"expected a length of 1 or more, got {self.length}: it is the number of heads")


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """Blocks that change nothing yet. The key is not used."""
    return {"blocks": jnp.zeros((config.length, config.target.width, config.target.width), jnp.float32)}


def shared(config: Config) -> Mapping[str, str]:
    """The target's head, and the embedding beside which it is stored."""
    return target_arrays(config.target, "embed", "head")


def feature_layers(config: Config) -> tuple[int, ...]:
    """What the target's head reads."""
    return (config.target.layers,)


def max_length(config: Config) -> int | None:
    """One token for each block."""
    return config.length


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``medusa_draft``."""
    return functools.partial(medusa_draft, config)


@functools.lru_cache
def medusa_draft(config: Config, draft_length: int) -> Draft:
    """A draft of ``draft_length`` tokens; the same arguments give the same object. It keeps the newest features [B D].

    Raises:
        ValueError: a draft_length that the drafter was not trained for.
    """
    check_length(draft_length, config.length)

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        return newest_of(given(features), prompt_length - 1)

    def propose(params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        newest = newest_of(given(context.features), context.num_fresh, state)
        scores = score(config.target, params, _heads(params, newest[:, None], draft_length)[:, 0])

        def propose_one(tokens: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            """Samples token i of the proposal."""
            token, probs, tokens = draw(keys, jax.lax.dynamic_index_in_dim(scores, i, 1, keepdims=False), tokens, context, i)
            return tokens, (token, probs)

        _, (tokens, probs) = jax.lax.scan(propose_one, context.tokens, jnp.arange(draft_length, dtype=jnp.int32))
        return Proposal(tokens.T, probs.swapaxes(0, 1)), newest

    return Draft(draft_length, init, propose)


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor, see ``family.Family``."""
    newest = before(given(features), anchor, transformer.positions(batch.segment))
    hidden = _heads(params, newest, length)
    return score(config.target, params, hidden.reshape(len(anchor), -1, hidden.shape[-1])).reshape(*hidden.shape[:3], -1)


def _heads(params: Params, newest: Array, length: int) -> Array:
    """[B A D] -> [B A K D]."""
    blocks = params["blocks"][:length].astype(newest.dtype)
    return newest[:, :, None] + jax.nn.silu(jnp.einsum("bad,kde->bake", newest, blocks))
