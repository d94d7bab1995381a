"""A draft that is a language model of its own, with its own KV cache.

The first step of a round takes the row's last two tokens as one block. After a full accept the draft has not yet read its own
last proposal: without the second token its cache would keep a hole there, which lowers acceptance and which no test of
losslessness can see. In every other case the first cell is rewritten with the same values, and a step that is bound by memory
costs no more for it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxspec.draft.drawing import draw
from jaxspec.types import Array, Cache, Context, Draft, LanguageModel, Params, Proposal


@functools.lru_cache
def model_draft(lm: LanguageModel, draft_length: int) -> Draft:
    """A draft that samples ``draft_length`` tokens one after the other from ``lm``, with the sampling settings of each row.

    The same arguments give the same object. Standard speculative sampling: arXiv 2211.17192 and 2302.01318.

    Args:
        lm: a model with the target's vocabulary.
        draft_length: K; 0 proposes nothing.

    Raises:
        ValueError: a negative draft_length.
    """
    if draft_length < 0:
        raise ValueError(f"expected a draft length of 0 or more, got {draft_length}")

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> Cache:
        return lm.apply(params, prompt, lm.init_cache(prompt.shape[0], cells), jnp.zeros_like(prompt_length))[2]

    def propose(params: Params, keys: Array, context: Context, state: Cache) -> tuple[Proposal, Cache]:
        if draft_length == 0:
            return _nothing(lm, params, context, state), state
        logits, cache = _last_two(lm, params, context, state)

        def propose_one(carry: tuple[Array, Array, Cache], i: Array) -> tuple[tuple[Array, Array, Cache], tuple[Array, Array]]:
            """Samples token i of the proposal, then computes the logits of the next."""
            logits, tokens, cache = carry
            token, probs, tokens = draw(keys, logits, tokens, context, i)
            logits, _, cache = lm.apply(params, token[:, None], cache, context.length + i)
            return (logits[:, 0], tokens, cache), (token, probs)

        carry, drawn = jax.lax.scan(propose_one, (logits, context.tokens, cache), jnp.arange(draft_length - 1, dtype=jnp.int32))
        logits, tokens, cache = carry
        token, probs, _ = draw(keys, logits, tokens, context, jnp.int32(draft_length - 1))
        tokens = jnp.concatenate([drawn[0].T, token[:, None]], axis=1)
        return Proposal(tokens, jnp.concatenate([drawn[1].swapaxes(0, 1), probs[:, None]], axis=1)), cache

    return Draft(draft_length, init, propose)


def _nothing(lm: LanguageModel, params: Params, context: Context, cache: Cache) -> Proposal:
    """An empty proposal."""
    logits, _, _ = jax.eval_shape(lm.apply, params, context.last[:, None], cache, context.length)
    batch, _, vocab = logits.shape
    return Proposal(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab), jnp.float32))


def _last_two(lm: LanguageModel, params: Params, context: Context, cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
    """The logits [B V] after the last token, from a block of the last two; a row of one token adds a garbage cell."""
    first = jnp.maximum(context.length - 2, 0)
    block = jnp.take_along_axis(context.tokens, first[:, None] + jnp.arange(2, dtype=jnp.int32)[None], axis=1)
    logits, _, cache = lm.apply(params, block, cache, first)
    last = context.length - 1 - first
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], cache
