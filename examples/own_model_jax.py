"""Bring your own model, in plain JAX: two pure functions are a target.

The model predicts the next code from the last two tokens. Its cache holds those tokens, each in the cell of its position.
"""

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec.types import Array, LanguageModel, Params

VOCAB, WIDTH, WINDOW = 16, 32, 2


def init_params(key: Array) -> Params:
    """Random parameters."""
    embed, head = jax.random.split(key)
    return {
        "embed": jax.random.normal(embed, (WINDOW, VOCAB, WIDTH), jnp.float32),
        "head": jax.random.normal(head, (WIDTH, VOCAB), jnp.float32),
    }


def init_cache(batch: int, cells: int) -> Array:
    """An empty cache, int32 [B S]: B is the leading axis, and there is a cell for each position."""
    return jnp.zeros((batch, cells), jnp.int32)


def apply(params: Params, tokens: Array, cache: Array, length: Array) -> tuple[Array, None, Array]:
    """Scores the block ``tokens`` [B T], whose first token has position ``length`` [B]: (logits [B T V], features, cache)."""
    write = jax.vmap(lambda row, block, first: jax.lax.dynamic_update_slice(row, block, (first,)))
    cache = write(cache, tokens, length)
    position = length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = jnp.zeros((*tokens.shape, WIDTH), jnp.float32)
    for back in range(WINDOW):
        seen = jnp.take_along_axis(cache, jnp.maximum(position - back, 0), axis=1)
        hidden += jnp.where((position >= back)[..., None], params["embed"][back][seen], 0.0)
    return jnp.tanh(hidden) @ params["head"], None, cache


def main() -> None:
    """Generates with the n-gram draft, which needs no parameters, and compares with the plain loop."""
    target, params = LanguageModel(apply, init_cache, VOCAB, VOCAB), init_params(jax.random.key(0))
    prompt, length = jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([3, 2])
    settings = {"max_new_tokens": 80, "sampling": jaxspec.Sampling(temperature=0)}

    draft = jaxspec.ngram_draft(3, VOCAB)
    out = jaxspec.generate(jax.random.key(1), target, params, draft, (), jaxspec.verify.exact(), prompt, length, **settings)
    plain = jaxspec.autoregressive(jax.random.key(1), target, params, prompt, length, **settings)
    print("tokens per round:", (out.length / out.info.rounds).round(2))
    print("equal to the plain loop:", bool((out.tokens == plain.tokens).all()))


if __name__ == "__main__":
    main()
