"""A draft without a model: the tokens that followed the latest earlier occurrence of the row's last n-gram (prompt look-up)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from jaxspec.types import Array, Context, Draft, Params, Proposal


@functools.lru_cache
def ngram_draft(draft_length: int, vocab: int, order: int = 2) -> Draft:
    """A draft that repeats what followed the latest earlier occurrence of the row's last ``order`` tokens.

    A continuation that reaches the end of the row starts over; without an occurrence the last token is repeated. In place of an
    id outside the head's vocabulary, 0 is proposed. The distributions are one-hot, which every verifier accepts. The same
    arguments give the same object.

    Args:
        draft_length: K.
        vocab: V of the target.
        order: the n of the n-gram: how many tokens must agree.

    Raises:
        ValueError: a negative draft_length, or an order below 1.
    """
    if draft_length < 0 or order < 1:
        raise ValueError(f"expected a draft length of 0 or more and an order of 1 or more, got {draft_length} and {order}")

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> tuple[()]:
        return ()

    def propose(params: Params, keys: Array, context: Context, state: tuple[()]) -> tuple[Proposal, tuple[()]]:
        look_up = functools.partial(_continuation, draft_length=draft_length, order=order)
        tokens = jax.vmap(look_up)(context.tokens, context.length)
        tokens = jnp.where(tokens < vocab, tokens, 0)
        return Proposal(tokens, jax.nn.one_hot(tokens, vocab, dtype=jnp.float32)), state

    return Draft(draft_length, init, propose)


def _continuation(
    tokens: Int32[Array, " S"], length: Int32[Array, ""], draft_length: int, order: int
) -> Int32[Array, " {draft_length}"]:
    """The K tokens of one row that follow the latest earlier occurrence of its end: tokens int32 [S] -> int32 [K]."""
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    # An occurrence is identified by the position after it, which lies before the end and has room for the n-gram before it.
    found = (position >= order) & (position < length)
    for back in range(1, order + 1):
        found &= jnp.roll(tokens, back) == tokens[length - back]
    after = jnp.max(jnp.where(found, position, -1))
    after = jnp.where(after < 0, length - 1, after)
    return tokens[after + jnp.arange(draft_length, dtype=jnp.int32) % (length - after)]
