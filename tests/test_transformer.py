"""The transformer against transformers' Llama, Qwen2 and Qwen3, and on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoints import folded, planned

from jaxspec import cache as kv
from jaxspec import draft, verify
from jaxspec.convert import llama
from jaxspec.models.transformer import (
    Config,
    RopeScaling,
    Transformer,
    abstract_params,
    init_params,
    language_model,
    logical_axes,
)
from jaxspec.sampling import Sampling
from jaxspec.speculate import autoregressive, generate

VOCAB, WIDTH = 97, 48
SMALL = Config((VOCAB,), VOCAB, WIDTH, 2, 4, 2, 12, 80)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
GREEDY = {"max_new_tokens": 64, "sampling": Sampling(temperature=0)}
CASES = {
    "llama": (transformers.LlamaForCausalLM, SMALL),
    "llama one kv head, tied": (transformers.LlamaForCausalLM, dataclasses.replace(SMALL, kv_heads=1, tied=True)),
    "llama scaled rope, wide heads": (
        transformers.LlamaForCausalLM,
        dataclasses.replace(SMALL, rope_theta=500_000.0, rope_scaling=SCALING, head_dim=32, norm_eps=1e-5),
    ),
    "qwen2 biases": (transformers.Qwen2ForCausalLM, dataclasses.replace(SMALL, qkv_bias=True, rope_theta=1e6)),
    "qwen2 biases, tied, no groups": (
        transformers.Qwen2ForCausalLM,
        dataclasses.replace(SMALL, qkv_bias=True, tied=True, kv_heads=4),
    ),
    "qwen3 norms, odd heads": (
        transformers.Qwen3ForCausalLM,
        dataclasses.replace(SMALL, qk_norm=True, heads=6, kv_heads=3, head_dim=16),
    ),
}


def reference(kind, config):
    """A random model of transformers with the shape of ``config``, its weights large enough to matter."""
    scaling = config.rope_scaling
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    settings = kind.config_class(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tied,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = kind(settings).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value += 0.1 * torch.randn_like(value)
    return model


def converted(model, config):
    """The weights of a model of transformers as our parameters."""
    names = {llama.EMBED: "table_0", llama.HEAD: "head"}
    state = {names.get(name, name): value.numpy() for name, value in model.state_dict().items()}
    if config.tied:
        del state["head"]
    return planned(folded(state), llama.RULES, abstract_params(config))


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(case):
    kind, config = CASES[case]
    model = reference(kind, config)
    params = converted(model, config)
    lm = language_model(config)
    prompt = np.random.default_rng(1).integers(VOCAB, size=(1, 21))
    with torch.no_grad():
        theirs = model(torch.from_numpy(prompt)).logits.numpy()
        spoken = model.generate(torch.from_numpy(prompt), max_new_tokens=64, do_sample=False).numpy()[:, 21:]
    ours, _, _ = lm.apply(params, jnp.asarray(prompt, jnp.int32), lm.init_cache(1, 32), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

    plain = autoregressive(jax.random.key(0), lm, params, prompt.astype(np.int32), np.array([21], np.int32), **GREEDY)
    assert plain.tokens.tolist() == spoken.tolist()


def test_a_model_that_drafts_for_itself_is_always_right():
    config = dataclasses.replace(SMALL, qk_norm=True, qkv_bias=True)
    lm, params = language_model(config), init_params(jax.random.key(3), config)
    prompts, lengths = np.arange(24, dtype=np.int32).reshape(2, 12), np.array([12, 5], np.int32)
    plain = autoregressive(jax.random.key(0), lm, params, prompts, lengths, **GREEDY)
    own = draft.model_draft(lm, 3)
    fast = generate(jax.random.key(0), lm, params, own, params, verify.exact(), prompts, lengths, **GREEDY)
    assert fast.tokens.tolist() == plain.tokens.tolist()
    assert fast.info.rounds.tolist() == [16, 16]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_lone_token_said_twice_says_the_same(monkeypatch, platform):
    """To the last cell that the row may fill: the second one's cell must lie within the cache."""
    config = dataclasses.replace(SMALL, layers=2)
    params, prompt, length = init_params(jax.random.key(3), config), np.arange(7, dtype=np.int32)[None], np.array([7], np.int32)
    once = language_model(config)
    said = autoregressive(jax.random.key(0), once, params, prompt, length, **GREEDY)
    asked = []

    def elsewhere(*arguments, default, **others):
        asked.append(default.__name__)
        return others.get(platform, default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    twice = language_model.__wrapped__(config)
    assert autoregressive(jax.random.key(0), twice, params, prompt, length, **GREEDY).tokens.tolist() == said.tokens.tolist()
    for K in (0, 3):
        own = draft.model_draft(twice, K)
        fast = generate(jax.random.key(0), twice, params, own, params, verify.exact(), prompt, length, **GREEDY)
        assert fast.tokens.tolist() == said.tokens.tolist()
        assert fast.info.rounds.tolist() == [-(-64 // (K + 1))]
    assert {"once", "_at_once", "product"} <= set(asked)


@pytest.mark.parametrize("rows", [1, 5, 67])
def test_a_cache_written_row_by_row_is_the_cache_written_at_once(rows):
    """To the last cell and beyond it, where a block is moved back; 67 rows are more than one turn of the loop unrolls."""
    keys = jax.random.split(jax.random.key(0), 3)
    cache, blocks = (kv.of_block(*jax.random.normal(key, (2, rows, T, 2, 4))) for key, T in zip(keys, (9, 3), strict=False))
    length = jax.random.randint(keys[2], (rows,), 0, 9)
    for ours, theirs in zip(kv._row_by_row(cache, blocks, length), kv._at_once(cache, blocks, length), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_block_sees_no_later_token():
    config = dataclasses.replace(SMALL, qk_norm=True)
    params, tokens = init_params(jax.random.key(0), config), jnp.arange(9)[None]

    @jax.jit
    @jax.grad
    def gradient(table, position):
        logits, _, _ = Transformer(config).apply({"params": {**params, "table_0": table}}, tokens)
        return logits[0, position].sum()

    for position in (0, 4, 8):
        moved = jnp.abs(gradient(params["table_0"], position)).sum(-1)[:9] > 0
        assert moved.tolist() == [i <= position for i in range(9)]


def test_ids_run_through_the_input_tables_and_the_head_is_a_slice():
    config = dataclasses.replace(SMALL, input_tables=(VOCAB, 5, 11), vocab=40, head_bias=True, tied=True)
    config = dataclasses.replace(config, feature_layers=(config.layers,))
    params = init_params(jax.random.key(0), config)
    tokens = jnp.array([[0, VOCAB - 1, VOCAB, VOCAB + 4, VOCAB + 5, VOCAB + 15]])
    embedded = Transformer(config).apply({"params": params}, tokens, method="embed")[0]
    rows = [params["table_0"][0], params["table_0"][-1], params["table_1"][0], params["table_1"][4], params["table_2"][0]]
    np.testing.assert_array_equal(embedded, jnp.stack([*rows, params["table_2"][10]]))
    logits, features, _ = Transformer(config).apply({"params": {**params, "head_bias": jnp.arange(40.0)}}, tokens)
    np.testing.assert_allclose(logits, features @ params["table_0"][:40].T + jnp.arange(40.0)[None, None], atol=1e-4)


def test_bfloat16_keeps_logits_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16", feature_layers=(0,))
    lm, params = language_model(config), init_params(jax.random.key(0), config)
    cache = lm.init_cache(1, 8)
    logits, features, cache = lm.apply(params, jnp.arange(6)[None], cache, jnp.zeros(1, jnp.int32))
    assert (logits.dtype, features.dtype, cache[0].key.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    wide, _, _ = Transformer(SMALL).apply({"params": params}, jnp.arange(6)[None])
    np.testing.assert_allclose(logits, wide, atol=0.1)


def test_every_parameter_names_its_axes():
    config = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True, head_bias=True)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    axes = logical_axes(config)
    known = {"embed", "heads", "kv_heads", "mlp", "vocab"}
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(axes), strict=True):
        assert len(spec) == leaf.ndim, path
        assert set(spec) <= known, path


@pytest.mark.parametrize("change", [{"kv_heads": 3}, {"tied": True, "vocab": VOCAB + 1}, {"feature_layers": (SMALL.layers + 1,)}])
def test_an_impossible_shape_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(SMALL, **change)
