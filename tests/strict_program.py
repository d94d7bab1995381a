"""The loop and the numerical core, written for JAX's strictest settings; ``tokens`` is also run without them, to compare.

As a program it prints the tokens as JSON: test_strict.py runs it with every setting.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

K = 2


def tokens():
    """What each rule, another draft, the plain loop and the loop in segments emit."""
    from jaxspec import Sampling, groups, request, speculate, verify
    from jaxspec.draft import model_draft, ngram_draft
    from jaxspec.models.transformer import Config, init_params, language_model

    with jax.transfer_guard("allow"):
        shape = {"vocab": 11, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 24}
        shape |= {"qkv_bias": True, "qk_norm": True, "head_bias": True}
        big, small = Config((11, 4), layers=1, feature_layers=(0, 1), **shape), Config((11, 4), layers=1, **shape)
        start = [jax.random.key(i, impl="threefry2x32") for i in range(2)]
        params, draft_params = init_params(start[0], big), init_params(start[1], small)
        near = groups.acoustic_similarity_groups(np.asarray(params["table_0"]), 0.1, num_codes=10)
        rules = [verify.exact(), verify.coarse_grained(near)]
        key = jax.random.key(5, impl="rbg")
    target, draft = language_model(big), model_draft(language_model(small), K)
    prompt, length = np.random.default_rng(0).integers(0, 15, (5, 4)), np.array([4, 1, 2, 3, 4])
    sampling = [
        Sampling(temperature=0),
        Sampling(top_k=5),
        Sampling(top_p=0.9),
        Sampling(repetition_window=3),
        Sampling(repetition_penalty=1.2, min_p=0.01, withheld=10, min_new_tokens=3),
    ]
    settings = {"max_new_tokens": 9, "stop_ids": (10,), "sampling": sampling}
    calls = [(draft, draft_params, rule) for rule in rules] + [(ngram_draft(2, 11), None, rules[0])]
    outs = [speculate.generate(key, target, params, *call, prompt, length, **settings) for call in calls]
    outs.append(speculate.autoregressive(key, target, params, prompt, length, **settings))
    asked = request.check(key, prompt, length, 9, None, (10,), sampling)
    state = speculate.init(target, params, draft, draft_params, asked, 4 + 9 + K + 1)
    state = speculate.advance(target, params, draft, draft_params, rules[0], state, jax.device_put(np.int32(100)))
    outs.append(speculate.finish(state, 9))
    said = [jax.device_get(out.tokens).tolist() for out in outs]
    assert said[-1] == said[0]
    return said


def check_types():
    """Distributions stay float32 and integers int32, of whatever type the arguments are."""
    from jaxspec.groups import acoustic_similarity_groups, swap
    from jaxspec.sampling import Sampling, probabilities, rows, sample
    from jaxspec.types import History
    from jaxspec.verify import coarse_grained, exact, tolerance

    vocab = 300
    groups = acoustic_similarity_groups(
        np.random.default_rng(0).normal(size=(vocab, 3)), np.float64(0.9), num_codes=np.int64(vocab - 1)
    )
    assert {array.dtype for array in groups} == {np.dtype("int32")}
    settings = [
        Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
        Sampling(temperature=0, repetition_penalty=1.2),
        Sampling(top_k=25, top_p=0.8, repetition_window=10),
        Sampling(repetition_window=2, repetition_redraw_all=True, withheld=3, min_new_tokens=99),
    ]
    batch = len(settings)

    @jax.jit
    def round_of(verify, keys, logits, settings, history):
        probs = probabilities(logits, settings, history)
        drafted = jax.vmap(sample)(keys, probs[:, 1:])
        verdict = jax.vmap(verify)(keys, drafted, probs[:, 1:], probs)
        return probs, drafted, verdict, jax.vmap(swap, (0, None, 0))(keys, groups, drafted)

    arguments = (
        jax.random.split(jax.random.key(0), batch),
        jnp.float32(np.random.default_rng(1).normal(size=(batch, K + 1, vocab))),
        rows(settings, batch),
        History(jnp.zeros((batch, 20), jnp.int64), jnp.full(batch, 2, jnp.int32), jnp.full(batch, 9, jnp.int64)),
    )
    for verify in (exact(), tolerance(np.float64(0.4)), coarse_grained(groups)):
        with jax.transfer_guard("disallow"):
            out = round_of(verify, *arguments)
        probs, *integers = jax.tree.map(np.asarray, out)
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
        assert {leaf.dtype for leaf in jax.tree.leaves(integers)} == {np.dtype("int32")}
    alone = probabilities(arguments[1][2], settings[2], History(jnp.zeros(20, jnp.int32), jnp.int32(2), jnp.int32(9)))
    np.testing.assert_allclose(alone, probs[2], atol=1e-6)
    assert probabilities(jnp.zeros(9), settings[0]).dtype == np.float32  # float64 logits
    assert sample(jax.random.key(0), jnp.ones((2, 9))).dtype == np.int32


if __name__ == "__main__":
    assert jax.config.jax_enable_x64
    with jax.transfer_guard("allow"):
        assert jax.random.key_impl(jax.random.key(0)) == "rbg"
        check_types()
    json.dump(tokens(), sys.stdout)
