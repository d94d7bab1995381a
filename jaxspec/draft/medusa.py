"""The simplest drafter on the target's features: one residual block for each position of the proposal, blind to the others.

Block k is h + silu(h W_k) on the hidden state that predicted the last token, and the head is the target's (Medusa, arXiv
2401.10774, whose heads have weights of their own). Its tokens are drawn independently of each other.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.draft.drawing import draw_each
from jaxspec.draft.family import (
    Packed,
    before,
    check_length,
    embedding_and_head,
    given,
    last_hidden,
    newest_of,
    on_every_chip,
    score,
    trained_length,
)
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


shared, feature_layers, max_length = embedding_and_head, last_hidden, trained_length


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
        return draw_each(keys, context, scores), newest

    return on_every_chip(Draft(draft_length, init, propose))


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits after every anchor, see ``family.Family``."""
    newest = before(given(features), anchor, transformer.positions(batch.segment))
    return score(config.target, params, _heads(params, newest, length))


def _heads(params: Params, newest: Array, length: int) -> Array:
    """[B A D] -> [B A K D]."""
    blocks = params["blocks"][:length].astype(newest.dtype)
    return newest[:, :, None] + jax.nn.silu(jnp.einsum("bad,kde->bake", newest, blocks))
