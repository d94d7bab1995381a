"""Draws one token of every row's proposal from a draft's logits, as the target would sample there."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32, Key

from jaxspec import sampling as sampling_lib
from jaxspec.types import Array, Context, History


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
    probs = sampling_lib.probabilities(logits, context.sampling, History(tokens, context.start, context.length + i))
    token = jax.vmap(lambda key, row: sampling_lib.sample(jax.random.fold_in(key, i), row))(keys, probs)
    here = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] == (context.length + i)[:, None]
    return token, probs, jnp.where(here, token[:, None], tokens)
