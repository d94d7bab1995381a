"""Models, drafts and verifiers that break their contracts are refused in one sentence, or end their own row only."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import autoregressive, generate, verify
from jaxspec.draft import model_draft
from jaxspec.models.transformer import Config, init_params, language_model
from jaxspec.state import INVALID_VERDICT, LENGTH_LIMIT, NON_FINITE
from jaxspec.types import Draft, LanguageModel, Proposal, Verdict

V, K, N = 7, 3, 8
LM = fakes.hash_model()
TARGET = fakes.table(0, V)
PROMPT, LENGTH = fakes.prompts(seed=0, batch=4, width=5, vocab=V)


def run(lm=LM, params=TARGET, draft=None, rule=None, prompt=PROMPT):
    draft = model_draft(LM, K) if draft is None else draft
    return generate(jax.random.key(0), lm, params, draft, TARGET, rule or verify.exact(), prompt, LENGTH, max_new_tokens=N)


# --- verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["too many", "negative", "a token beyond the vocabulary", "a negative token"])
def test_a_verdict_out_of_bounds_ends_its_row_and_no_other(wrong):
    """The rule is wrong for the row with a certain key only."""
    keys = jax.random.split(jax.random.key(3), 4)
    marked = jax.random.key_data(jax.random.fold_in(keys[2], int(LENGTH[2])))
    honest = verify.exact()

    def rule(key, *proposal):
        verdict = honest(key, *proposal)
        here = (jax.random.key_data(key) == marked).all()
        bad = {
            "too many": verdict._replace(num_accepted=jnp.int32(K + 1)),
            "negative": verdict._replace(num_accepted=jnp.int32(-1)),
            "a token beyond the vocabulary": verdict._replace(token=jnp.int32(V)),
            "a negative token": verdict._replace(token=jnp.int32(-1)),
        }[wrong]
        return jax.tree.map(lambda a, b: jnp.where(here, a, b), bad, verdict)

    call = (LM, TARGET, model_draft(LM, K), TARGET + fakes.table(1, V))
    out = generate(keys, *call, rule, PROMPT, LENGTH, max_new_tokens=N)
    clean = generate(keys, *call, honest, PROMPT, LENGTH, max_new_tokens=N)
    assert out.info.stop_reason.tolist() == [LENGTH_LIMIT, LENGTH_LIMIT, INVALID_VERDICT, LENGTH_LIMIT]
    assert int(out.length[2]) == 0
    first_round = generate(keys, *call, rule, PROMPT, LENGTH, max_new_tokens=1)
    assert first_round.info.stop_reason.tolist() == [LENGTH_LIMIT, LENGTH_LIMIT, INVALID_VERDICT, LENGTH_LIMIT]
    np.testing.assert_array_equal(out.tokens[np.array([0, 1, 3])], clean.tokens[np.array([0, 1, 3])])


def test_one_drafted_probability_that_is_not_a_number_ends_its_row():
    def propose(params, keys, context, state):
        probs = jnp.full((len(keys), K, V), 1 / V, jnp.float32).at[1, 1, 2].set(jnp.nan)
        return Proposal(jnp.full((len(keys), K), 1, jnp.int32), probs), state

    out = run(draft=Draft(K, lambda *_: (), propose))
    assert out.info.stop_reason.tolist() == [LENGTH_LIMIT, NON_FINITE, LENGTH_LIMIT, LENGTH_LIMIT]


@pytest.mark.parametrize("length", [0, K])
def test_caches_have_room_for_the_prompt_the_limit_and_a_block(length):
    asked = []
    lm = LM._replace(init_cache=lambda batch, cells: asked.append((batch, cells)) or LM.init_cache(batch, cells))
    if length:
        run(lm)
    else:
        autoregressive(jax.random.key(0), lm, TARGET, PROMPT, LENGTH, max_new_tokens=N)
    assert asked[0] == (4, PROMPT.shape[1] + N + length + 1)  # then it is asked for more, to see that it gives as many as asked


def test_a_drafted_token_beyond_the_vocabulary_ends_its_row():
    def propose(params, keys, context, state):
        tokens = jnp.full((len(keys), K), 1).at[1, 1].set(V)
        return Proposal(tokens, jnp.full((len(keys), K, V), 1 / V)), state

    out = run(draft=Draft(K, lambda params, prompt, prompt_length, cells, features: (), propose), rule=fakes.accept_all)
    assert (out.info.stop_reason == INVALID_VERDICT).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(jnp.zeros(2, jnp.int32), jnp.int32(0)),
        Verdict(jnp.float32(1), jnp.int32(0)),
        Verdict(jnp.int32(0), jnp.float32(0)),
    ],
)
def test_a_verdict_of_another_shape_or_type_is_refused(verdict):
    with pytest.raises(ValueError, match="expected a verifier to return its counts and its token as integers"):
        run(rule=lambda *proposal: verdict)


# --- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [lambda cells: cells - 1, lambda cells: 10, lambda cells: min(cells, 10)])
def test_a_cache_with_too_few_cells_is_refused(cells):
    small = LanguageModel(LM.apply, lambda batch, asked: LM.init_cache(batch, cells(asked)))
    with pytest.raises(ValueError, match=r"room for 17 positions, got shapes"):
        run(lm=small)


def test_a_cache_without_the_batch_in_front_is_refused():
    turned = LanguageModel(LM.apply, lambda batch, cells: jnp.zeros((cells, batch), jnp.int32))
    with pytest.raises(ValueError, match=r"to give arrays \[4, ...\]"):
        run(lm=turned)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, features, cache: (logits, cache),
        lambda logits, features, cache: (logits[:, -1], features, cache),
        lambda logits, features, cache: (logits, features[:, 0], cache),
        lambda logits, features, cache: (logits, features, cache.astype(jnp.float32)),
        lambda logits, features, cache: logits,
    ],
)
def test_other_results_of_apply_are_refused(change):
    wrong = LanguageModel(lambda *arguments: change(*LM.apply(*arguments)), LM.init_cache)
    for call in (
        lambda: run(lm=wrong),
        lambda: autoregressive(jax.random.key(0), wrong, TARGET, PROMPT, LENGTH, max_new_tokens=N),
    ):
        with pytest.raises(ValueError, match="expected apply to return"):
            call()


def test_a_vocabulary_that_is_not_the_logits_is_refused():
    with pytest.raises(ValueError, match=r"logits \[4, 5, 9\]"):
        run(lm=LM._replace(vocab=9))


def test_prompt_ids_beyond_every_table_are_refused():
    config = Config((V, 2), V, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    lm, params = language_model(config), init_params(jax.random.key(0), config)
    with pytest.raises(ValueError, match="prompt ids below 9, got 9"):
        autoregressive(jax.random.key(0), lm, params, np.array([[1, 9]]), [2], max_new_tokens=2)
    assert autoregressive(jax.random.key(0), lm, params, np.array([[1, 8]]), [2], max_new_tokens=2).length.tolist() == [2]


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="expected a mesh with Auto axes, got Explicit ones"), jax.set_mesh(mesh):
        run()
    params = jax.device_put(TARGET, jax.NamedSharding(mesh, jax.P()))
    with pytest.raises(ValueError, match="expected a mesh with Auto axes, got Explicit ones"):
        run(params=params)
