"""Draws the tokens of every row's proposal from a draft's logits, as the target would sample there."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32, Key

from jaxspec import sampling as sampling_lib
from jaxspec.types import Array, Context, History, Proposal

_Carry = TypeVar("_Carry")


def draw(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], tokens: Int32[Array, "B S"], context: Context, i: Int32[Array, ""]
) -> tuple[Int32[Array, " B"], Float32[Array, "B V"], Int32[Array, "B S"]]:
    """Token i of every row's proposal.

    The tokens drafted before it are part of the history, so that penalties and repetition-aware sampling see them.

    Args:
        keys: of the round; token i is drawn with the i-th key folded in.
        logits: of the draft.
        tokens: the context's tokens with the first i of the proposal after them.
        context: of the round.
        i: 0 .. K-1.

    Returns:
        the token [B], the distribution that it is drawn from [B V], and ``tokens`` with the token added.
    """
    probs = sampling_lib.probabilities(logits, context.sampling, History(tokens, context.start, context.length + i), rough=True)
    token = jax.vmap(lambda key, row: sampling_lib.sample(jax.random.fold_in(key, i), row))(keys, probs)
    here = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] == (context.length + i)[:, None]
    return token, probs, jnp.where(here, token[:, None], tokens)


def draw_in_turn(
    keys: Key[Array, " B"],
    context: Context,
    length: int,
    logits: Callable[[_Carry, Array, Array], tuple[Array, _Carry]],
    carry: _Carry,
) -> Proposal:
    """A proposal that is drawn token by token, each given the one before it.

    Args:
        keys: of the round.
        context: of the round.
        length: K.
        logits: (carry, the token before int32 [B], i) -> (the logits of token i [B V], carry).
        carry: what ``logits`` carries from token to token.
    """

    def draw_one(state: tuple[_Carry, Array, Array], i: Array) -> tuple[tuple[_Carry, Array, Array], tuple[Array, Array]]:
        carry, previous, tokens = state
        scores, carry = logits(carry, previous, i)
        token, probs, tokens = draw(keys, scores, tokens, context, i)
        return (carry, token, tokens), (token, probs)

    slots = jnp.arange(length, dtype=jnp.int32)
    _, (tokens, probs) = jax.lax.scan(draw_one, (carry, context.last, context.tokens), slots)
    return Proposal(tokens.T, probs.swapaxes(0, 1))


def draw_each(keys: Key[Array, " B"], context: Context, logits: Float[Array, "B K V"]) -> Proposal:
    """A proposal from logits that do not depend on its tokens."""

    def one(carry: tuple[()], previous: Array, i: Array) -> tuple[Array, tuple[()]]:
        return jax.lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False), carry

    return draw_in_turn(keys, context, logits.shape[1], one, ())
