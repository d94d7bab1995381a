"""Write a verifier: accept a drafted code if it is among the target's k most probable ones.

This is the rule of LLaSA+ with k = 50. It is approximate: nothing bounds how far the output is from the target's distribution.
"""

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec.models.transformer import Config, init_params, language_model
from jaxspec.types import Array, Verdict, Verify
from jaxspec.verify.exact import accepted, correct, count_accepted, count_exact, drafted_probs


def among_best(k: int) -> Verify:
    """Accepts what is among the ``k`` best. A verifier is written for one sequence; the loop maps it over the batch.

    As a ``Partial``, its arrays are arguments of the compiled program: another ``k`` does not recompile.
    """
    return jax.tree_util.Partial(_verify, jnp.int32(k))


def _verify(k: Array, key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array) -> Verdict:
    accept_key, token_key = jax.random.split(key)
    drafted, wanted = drafted_probs(draft_tokens, draft_probs, target_probs)
    better = (target_probs[:-1] > wanted[:, None]).sum(-1, dtype=jnp.int32)
    num_accepted = count_accepted((better < k) & (wanted > 0))
    token = correct(token_key, num_accepted, draft_probs, target_probs)
    # Optional: how many of the accepted codes the exact rule accepts with the same random numbers.
    exact = accepted(jax.random.uniform(accept_key, draft_tokens.shape, jnp.float32), drafted, wanted)
    return Verdict(num_accepted, token, count_exact(num_accepted, exact))


def main() -> None:
    """Compares acceptance with the exact rule's; the draft is the first layer of the target."""
    shape = {"input_tables": (64,), "vocab": 64, "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 64}
    big, small = Config(layers=2, **shape), Config(layers=1, **shape)
    target, draft = language_model(big), jaxspec.model_draft(language_model(small), 3)
    params = init_params(jax.random.key(0), big)
    draft_params = {name: part for name, part in params.items() if name != "layer_1"}
    prompt, length = jnp.array([[1, 2, 3]] * 4), jnp.full(4, 3)
    for name, verify in (("exact", jaxspec.verify.exact()), ("best 5", among_best(5)), ("best 20", among_best(20))):
        run = (jax.random.key(2), target, params, draft, draft_params, verify, prompt, length)
        info = jaxspec.generate(*run, max_new_tokens=60, sampling=jaxspec.Sampling(temperature=0.3)).info
        rates = [x.sum() / info.drafted.sum() for x in (info.accepted, info.exact_matches)]
        print(f"{name:8} accepted {rates[0]:.0%} of the drafted codes, {rates[1]:.0%} by the exact rule too")


if __name__ == "__main__":
    main()
