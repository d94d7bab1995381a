"""Bring your own model, in flax nnx: split the module once, and merge it inside ``apply``."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec import cache as kv
from jaxspec.types import Array, Cache, LanguageModel, Params

VOCAB, WIDTH = 64, 32


class Model(nnx.Module):
    """One layer of single-head attention over a KV cache; see ``jaxspec.cache`` for its layout."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: Array, cache: kv.KVCache, length: Array) -> tuple[Array, kv.KVCache]:
        """tokens [B T] at positions ``length`` [B] and on -> (logits [B T V], cache)."""
        x = self.embed(tokens)
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        cache = kv.write(cache, kv.of_block(key[:, :, None], value[:, :, None]), length)
        scores = jnp.einsum("btd,bds->bts", query, cache.key[:, 0]) / WIDTH**0.5
        seen = kv.visible(length, tokens.shape[1], cache.cells)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return self.head(x + jnp.einsum("bts,bsd->btd", weights, cache.value[:, 0])), cache


def language_model(model: Model) -> tuple[LanguageModel, Params]:
    """The module as the pair of pure functions that the loop takes, and its parameters."""
    graph, params = nnx.split(model)

    def apply(params: Params, tokens: Array, cache: Cache, length: Array) -> tuple[Array, None, Cache]:
        logits, cache = nnx.merge(graph, params)(tokens, cache, length)
        return logits, None, cache

    def init_cache(batch: int, cells: int) -> Cache:
        return kv.init(batch, cells, 1, WIDTH, jnp.dtype("float32"))

    return LanguageModel(apply, init_cache, VOCAB, VOCAB), params


def main() -> None:
    """The model drafts for itself: every code is accepted, and a round emits K + 1 codes."""
    target, params = language_model(Model(nnx.Rngs(0)))
    draft = jaxspec.model_draft(target, 3)
    prompt, length = jnp.array([[1, 2, 3]]), jnp.array([3])
    run = (jax.random.key(0), target, params, draft, params, jaxspec.verify.exact(), prompt, length)
    out = jaxspec.generate(*run, max_new_tokens=40)
    print("tokens per round:", (out.length / out.info.rounds).round(2))


if __name__ == "__main__":
    main()
