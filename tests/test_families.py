"""Every family of trained drafters: what training compares is what the loop proposes from, and the loop stays exact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import speculate, verify
from jaxspec.common.trees import flatten, unflatten
from jaxspec.draft import block, eagle, medusa, mtp, recurrent, smaller, streaming
from jaxspec.draft.families import FAMILIES, from_json, to_json
from jaxspec.draft.family import Packed
from jaxspec.models import transformer
from jaxspec.sampling import Sampling

V, K = 12, 3
TARGET = transformer.Config((V, 5), V, 32, 3, 4, 2, 8, 48, qk_norm=True)
SMALL = transformer.Config((V, 5), V, 16, 1, 2, 2, 8, 24)
LAYERS = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 40}
PUBLISHED = {"hint": False, "bidirectional": True, "own_head": True, "qwen3": True, "rope_theta": 100.0}
NARROW = {**LAYERS, "width": 16, "heads": 2}
TARGET_PARAMS = transformer.init_params(jax.random.key(0), TARGET)

CONFIGS = {
    "layers of the target": ("model", smaller.Config(TARGET, layers=(0, 2), trained=("layer_0", "head"))),
    "a smaller shape": ("model", smaller.Config(TARGET, shape=SMALL)),
    "block": ("block", block.Config(TARGET, (0, 3), 4, **LAYERS, markov_rank=6)),
    "block, own head": ("block", block.Config(TARGET, (1,), 4, **NARROW, markov_rank=6, markov_top=5, own_head=True)),
    "block, DSpark": ("block", block.Config(TARGET, (0, 1), 4, **LAYERS, markov_rank=6, **PUBLISHED, partial_head=True)),
    "block, DFlash": (
        "block",
        block.Config(TARGET, (1,), 8, **LAYERS, markov_rank=0, **PUBLISHED, from_anchor=False, window=3),
    ),
    "recurrent": ("recurrent", recurrent.Config(TARGET, (3,), 4, 32, 40)),
    "recurrent, attention, own head": ("recurrent", recurrent.Config(TARGET, (0, 2), 4, 16, 24, attend=True, own_head=True)),
    "eagle": ("eagle", eagle.Config(TARGET, (0, 1, 2), 4)),
    "eagle, own head": ("eagle", eagle.Config(TARGET, (1,), 4, own_head=True, partial_head=True)),
    "medusa": ("medusa", medusa.Config(TARGET, 4)),
    "mtp": ("mtp", mtp.Config(TARGET, 4)),
    "streaming": ("streaming", streaming.Config(TARGET, 4, layers=2, rank=6)),
}


def random_like(key, params):
    """Random values, so that parameters which start at zero count."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([leaf + 0.4 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def build(name):
    """The module, its config, and full parameters that are not those of ``init_params``."""
    family_name, config = CONFIGS[name]
    family = FAMILIES[family_name]
    own = flatten(random_like(jax.random.key(1), family.init_params(jax.random.key(2), config, TARGET_PARAMS)))
    theirs = flatten(TARGET_PARAMS)
    shared = {path: theirs[origin] for path, origin in family.shared(config).items()}
    assert not own.keys() & shared.keys()
    return family, config, unflatten(own | shared)


def target_of(family, config):
    return dataclasses.replace(TARGET, feature_layers=family.feature_layers(config))


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def logits(family, config, params, tokens, segment, anchor, length=K):
    """What training computes for rows of segments: [B A K V]."""
    batch, model = Packed(tokens, segment, segment > 0), transformer.Transformer(target_of(family, config))
    features = model.apply({"params": TARGET_PARAMS}, tokens, segment=segment)[1]
    return family.logits(config, params, batch, features, anchor, length)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_compares_the_distributions_that_are_proposed(name):
    """For rows of a running loop, whatever was accepted before: the proposal's probs are the softmax of ``logits``."""
    family, config, params = build(name)
    target, draft = target_of(family, config), family.drafter(config)(K)
    prompt = np.random.default_rng(0).integers(0, V + 5, (3, 5)).astype(np.int32)
    length = np.array([1, 5, 3], np.int32)
    run = (transformer.language_model(target), TARGET_PARAMS, draft, params)
    settings = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0)}
    seen = []

    def watch(params, keys, context, state):
        proposal, state = draft.propose(params, keys, context, state)
        jax.debug.callback(lambda *values: seen.append(values), context.tokens, context.length, proposal.tokens, proposal.probs)
        return proposal, state

    watched = draft._replace(propose=watch)
    out = speculate.generate(jax.random.key(3), *run[:2], watched, params, verify.exact(), prompt, length, **settings)
    jax.effects_barrier()
    assert {int(count) for count in np.asarray(out.info.accepted_per_position.sum(0))} != {0}
    assert len(seen) > 3
    for tokens, lengths, drafted, probs in [jax.tree.map(np.asarray, entry) for entry in seen]:
        rows = np.array(tokens)
        for row, (at, new) in enumerate(zip(lengths, drafted, strict=True)):
            rows[row, at : at + K] = new
        segment = (np.arange(rows.shape[1])[None] < lengths[:, None] + K).astype(np.int32)
        wanted = logits(family, config, params, rows, segment, lengths[:, None] - 1)[:, 0]
        np.testing.assert_allclose(probs, jax.nn.softmax(wanted), atol=2e-5)


TWINS = ("block, DSpark", "eagle, own head")  # of other rows, as far as packing goes


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in TWINS else ()) for name in CONFIGS])
def test_packed_sequences_do_not_see_each_other_nor_what_follows(name):
    family, config, params = build(name)
    rows = np.random.default_rng(1).integers(0, V, (3, 7)).astype(np.int32)
    anchor, ones = np.array([[1, 3]], np.int32), np.ones((1, 7), np.int32)
    alone = [np.asarray(logits(family, config, params, row[None], ones, anchor)) for row in rows]
    segment, anchors = (
        np.repeat(np.array([[1, 2, 3]], np.int32), 7, axis=1),
        np.concatenate([anchor + 7 * i for i in range(3)], 1),
    )
    packed = logits(family, config, params, rows.reshape(1, -1), segment, anchors)
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-5, atol=2e-5)
    changed = rows[:1].copy()
    changed[0, 1 + K :] = (changed[0, 1 + K :] + 1) % V  # tokens that none of the first anchor's distributions follows
    np.testing.assert_allclose(logits(family, config, params, changed, ones, anchor)[:, 0], alone[0][:, 0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(name):
    family_name, config = CONFIGS[name]
    assert from_json(family_name, to_json(config), "float32") == config
    assert from_json(family_name, to_json(config), "bfloat16").target.dtype == "bfloat16"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_config_gives_the_same_draft(name):
    family, config, _ = build(name)
    assert family.drafter(config)(2) is family.drafter(dataclasses.replace(config))(2)


@pytest.mark.parametrize("name", [name for name, (family, _) in CONFIGS.items() if family != "model"])
def test_a_length_beyond_training_is_refused(name):
    family, config, _ = build(name)
    assert family.max_length(config) == config.length
    for length in (0, config.length + 1):
        with pytest.raises(ValueError, match=f"expected a draft length from 1 to {config.length}, got {length}"):
            family.drafter(config)(length)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in TWINS])
def test_every_parameter_of_a_drafter_matters(name):
    family, config, params = build(name)
    own = flatten(family.init_params(jax.random.key(2), config, TARGET_PARAMS)).keys() - {"proposed"}
    rows, segment = np.random.default_rng(1).integers(0, V + 5, (1, 9)).astype(np.int32), np.ones((1, 9), np.int32)
    anchor, weight = np.array([[2, 4]], np.int32), jax.random.normal(jax.random.key(4), (V,))

    def value(leaves):
        made = unflatten(flatten(params) | leaves)
        scores = logits(family, config, made, rows, segment, anchor, family.max_length(config) or K)
        return (jax.nn.softmax(scores) * weight[None, None, None]).sum()

    gradient = jax.grad(value)({path: flatten(params)[path] for path in own})
    assert [path for path, leaf in gradient.items() if not np.abs(leaf).max() > 1e-6] == []


def test_streams_see_the_targets_own_keys_and_values():
    _, config, params = build("streaming")
    target = dataclasses.replace(TARGET, feature_layers=streaming.feature_layers(config))
    rows = np.random.default_rng(1).integers(0, V, (2, 5)).astype(np.int32)
    model = transformer.language_model(target)
    _, features, cache = model.apply(TARGET_PARAMS, jnp.asarray(rows), model.init_cache(2, 5), jnp.zeros(2, jnp.int32))
    position = jnp.tile(jnp.arange(5, dtype=jnp.int32)[None], (2, 1))
    made = streaming._keys_values(config, params, features, position)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), made, cache[-2:])
    # A stream whose adapters change nothing begins as the hidden state below the layers, which is the target's own.
    plain = unflatten(
        {path: 0 * leaf if path.split("/")[0] in ("first", "streams") else leaf for path, leaf in flatten(params).items()}
    )
    begun = streaming._begin(config, plain, features[..., :32], jnp.asarray(rows), 2)
    np.testing.assert_allclose(begun, np.repeat(np.asarray(features)[:, :, None, :32], 2, axis=2), atol=1e-6)
