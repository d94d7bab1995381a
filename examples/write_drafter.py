"""Write a drafter: a table of bigrams, counted on the target's own output, proposes the next codes."""

import functools

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec import sampling
from jaxspec.models.transformer import Config, init_params, language_model
from jaxspec.types import Array, Context, Draft, History, Params, Proposal


@functools.lru_cache  # the same K gives the same object, so that a second call does not recompile
def bigram_draft(draft_length: int) -> Draft:
    """Proposes K codes, each drawn from the row of its predecessor; the parameters are logits [V V]."""

    def init(params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> tuple[()]:
        return ()  # no state; otherwise arrays with B as the leading axis

    def propose(params: Params, keys: Array, context: Context, state: tuple[()]) -> tuple[Proposal, tuple[()]]:
        def one(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            last, tokens = carry
            logits = params[jnp.minimum(last, params.shape[0] - 1)]
            history = History(tokens, context.start, context.length + i)
            probs = sampling.probabilities(logits, context.sampling, history)  # as the target samples
            token = jax.vmap(lambda key, row: sampling.sample(jax.random.fold_in(key, i), row))(keys, probs)
            tokens = jax.vmap(lambda row, at, one: row.at[at].set(one))(tokens, context.length + i, token)
            return (token, tokens), (token, probs)

        _, drawn = jax.lax.scan(one, (context.last, context.tokens), jnp.arange(draft_length, dtype=jnp.int32))
        return Proposal(*(x.swapaxes(0, 1) for x in drawn)), state

    return Draft(draft_length, init, propose)


def main() -> None:
    """Counts bigrams in samples of the target, and drafts with them."""
    config = Config((64,), 64, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=64)
    target, params = language_model(config), init_params(jax.random.key(0), config)
    params |= {"head": 3 * params["head"]}  # random weights are nearly uniform; this makes them sharper
    prompt, length = jnp.arange(64)[:, None], jnp.full(64, 1)

    samples = jaxspec.autoregressive(jax.random.key(1), target, params, prompt, length, max_new_tokens=100).tokens
    counts = jnp.full((64, 64), 0.1).at[samples[:, :-1], samples[:, 1:]].add(1)
    for name, table in (("uniform", jnp.zeros((64, 64))), ("bigrams", jnp.log(counts))):
        run = (jax.random.key(2), target, params, bigram_draft(3), table, jaxspec.verify.exact(), prompt, length)
        info = jaxspec.generate(*run, max_new_tokens=100).info
        print(f"{name}: accepted {info.accepted.sum() / info.drafted.sum():.0%} of the drafted codes")


if __name__ == "__main__":
    main()
