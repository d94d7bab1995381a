"""Int8 weights: their error, what a model computes with them, and their way through conversion, drafts and training."""

import dataclasses
import json

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from commands import run

from jaxspec import Sampling, autoregressive, generate, verify
from jaxspec.bench import presets, roofline
from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.checkpoint.tensors import of_array, quantized
from jaxspec.common.trees import flatten
from jaxspec.convert.pipeline import Options, convert
from jaxspec.draft import block, eagle, families, model_draft, recurrent, smaller, streaming
from jaxspec.draft.families import FAMILIES
from jaxspec.draft.family import Packed, with_shared
from jaxspec.evaluate.plan import Plan
from jaxspec.evaluate.precision import precision
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
from jaxspec.models.int8 import dequantize, quantize, quantize_rows, rows
from jaxspec.models.transformer import Config, Transformer
from jaxspec.train import loop

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SMALL = Config((97, 5), 97, 48, 2, 4, 2, 12, 80, qk_norm=True)
SHAPES = {
    "untied, head bias": dataclasses.replace(SMALL, head_bias=True),
    "tied, padded, biases": dataclasses.replace(SMALL, input_tables=(112, 5), vocab=104, padding=7, tied=True, qkv_bias=True),
}


def as_int8(config, seed=0):
    """A shape with int8 weights, random floats of that shape, and their int8 values."""
    params = transformer.init_params(jax.random.key(seed), config)
    return dataclasses.replace(config, weights="int8"), params, jax.device_put(quantize(params))


def logits_of(config, params, tokens):
    """Of tokens [B T], without a cache."""
    return np.asarray(jax.jit(Transformer(config).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))[0])


def types(tree):
    return {path: (leaf.shape, np.dtype(leaf.dtype)) for path, leaf in flatten(tree).items()}


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)])
def test_a_value_is_off_by_half_a_scale_at_most(dtype):
    weights = (np.random.default_rng(0).standard_normal((50, 33)) * np.logspace(-6, 2, 50)[:, None]).astype(dtype)
    weights[7] = 0
    values, scale = quantize_rows(weights)
    floats = weights.astype(np.float32)
    error = np.abs(values * scale[:, None] - floats)
    np.testing.assert_allclose(scale, np.where(np.arange(50) == 7, 1, np.abs(floats).max(1) / 127), rtol=1e-6)
    assert (error <= scale[:, None] * 0.50001).all()
    assert (error.max(1) > scale * 0.2).sum() > 40  # the bound is about reached
    assert np.abs(values).max(1).tolist() == [0 if row == 7 else 127 for row in range(50)]


def test_blocks_of_rows_give_the_same_values_as_the_whole():
    weights = np.random.default_rng(0).standard_normal((37, 9)).astype(np.float32)
    values, scale = quantized(of_array("a", weights), block=5)
    wanted = quantize_rows(weights)
    assert (values.shape, values.dtype, scale.shape, scale.dtype) == ((37, 9), np.int8, (37,), np.float32)
    for start, stop in ((0, 37), (3, 21), (36, 90)):
        np.testing.assert_array_equal(values.read(start, stop), wanted[0][start:stop])
        np.testing.assert_array_equal(scale.read(start, stop), wanted[1][start:stop])


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_computes_what_the_dequantized_floats_give(name):
    config, floats, params = as_int8(SHAPES[name])
    tokens = np.random.default_rng(0).integers(sum(config.input_tables), size=(2, 19)).astype(np.int32)
    wanted = logits_of(SHAPES[name], dequantize(params), tokens)
    for some in (tokens, tokens[:, :5]):  # the head has one product for steps and another for prefills
        np.testing.assert_allclose(logits_of(config, params, some), wanted[:, : some.shape[1]], atol=2e-5)
    own = logits_of(SHAPES[name], floats, tokens)
    seen = np.isfinite(own)
    assert 1e-3 < np.abs(own[seen] - wanted[seen]).std() / own[seen].std() < 0.03
    np.testing.assert_array_equal(rows(params, "table_0", 3, 9), dequantize(params)["table_0"][3:9])


def test_parameters_have_the_shapes_types_and_axes_that_are_said():
    config, _, params = as_int8(dataclasses.replace(SMALL, layers=1, dtype="bfloat16"))
    wanted = {
        path: BFLOAT16 if kind == np.float32 and "_scale" not in path else kind for path, (_, kind) in types(params).items()
    }
    assert {path: kind for path, (_, kind) in types(transformer.stored_params(config)).items()} == wanted
    assert types(transformer.init_params(jax.random.key(0), config)) == types(params)
    assert types(presets.random_params(jax.random.key(0), config)) == types(transformer.stored_params(config))
    axes = flatten(transformer.logical_axes(config))
    for path in (path for path in axes if path.endswith("_scale")):
        kernel = axes[path.removesuffix("_scale")]
        assert tuple(axes[path]) == (kernel[1 if path.endswith("kernel_scale") else 0],)
    with pytest.raises(ValueError, match="expected weights among float, int8, got 'int4': choose one of these"):
        dataclasses.replace(SMALL, weights="int4")


def test_random_int8_weights_keep_the_variance():
    config = dataclasses.replace(SMALL, weights="int8", width=128, mlp_width=256)
    logits = logits_of(config, transformer.init_params(jax.random.key(0), config), np.arange(40).reshape(2, 20))
    assert 0.7 < logits.std() < 1.4


def test_both_loops_emit_the_tokens_of_the_dequantized_floats():
    config, _, params = as_int8(SMALL)
    draft, small = model_draft(transformer.language_model(dataclasses.replace(config, layers=1)), 3), {**params}
    del small["layer_1"]
    lm, floats = transformer.language_model(config), transformer.language_model(SMALL)
    asked = (np.array([[1, 98, 3], [7, 99, 0]], np.int32), np.array([3, 2], np.int32))
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9)):
        options = {"max_new_tokens": 24, "sampling": sampling}
        wanted = autoregressive(jax.random.key(1), floats, dequantize(params), *asked, **options)
        plain = autoregressive(jax.random.key(1), lm, params, *asked, **options)
        assert plain.tokens.tolist() == wanted.tokens.tolist()
    greedy = {"max_new_tokens": 24, "sampling": Sampling(temperature=0)}
    fast = generate(jax.random.key(0), lm, params, draft, small, verify.exact(), *asked, **greedy)
    assert fast.tokens.tolist() == autoregressive(jax.random.key(0), lm, params, *asked, **greedy).tokens.tolist()
    assert (fast.info.drafted > 0).all()


# --- conversion ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llasa(tmp_path_factory):
    """The checkpoint of an untied LLaSA in bfloat16, and the folder of its int8 conversion."""
    source, dest = tmp_path_factory.mktemp("llasa"), tmp_path_factory.mktemp("converted") / "int8"
    checkpoints.llasa(source, dtype=torch.bfloat16, tie_word_embeddings=False)
    convert(str(source), dest, Options(weights="int8"))
    return source, dest


def test_a_conversion_gives_the_int8_of_the_floats(llasa, tmp_path):
    source, dest = llasa
    convert(str(source), tmp_path / "floats")
    floats, loaded = pretrained.load(tmp_path / "floats"), pretrained.load(dest)
    assert loaded.model.shape == dataclasses.replace(floats.model.shape, weights="int8")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, quantize(floats.params))
    assert types(loaded.params) == types(transformer.stored_params(loaded.model.shape))
    wide = pretrained.load(dest, "float32")  # the scales lose nothing in either type
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide.params)} == {"int8", "float32"}
    assert set(loaded.model.tables) == {"table_0", "table_0_scale", "head", "head_scale"}
    written = pretrained.save(tmp_path / "again", loaded.model, loaded.params, loaded.tokenizer)
    assert written.digest == loaded.model.digest != floats.model.digest
    code, printed, _ = run("info", dest)
    assert code == 0
    assert ", weights int8" in printed


@pytest.mark.parametrize("name", ["cosyvoice2", pytest.param("neutts-air", marks=pytest.mark.slow)])
def test_every_family_with_a_transformer_has_int8(tmp_path, name):
    floats, int8 = (checkpoints.converted(tmp_path, name, pad_to=8, weights=weights) for weights in ("float", "int8"))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(int8).params, quantize(pretrained.load(floats).params))


def test_a_draft_of_some_layers_shares_the_int8_tables(llasa, tmp_path):
    source, dest = llasa
    code, printed, err = run("convert", source, tmp_path / "draft", "--layers", "2,0", "--weights", "int8")
    assert (code, err) == (0, "")
    assert printed.startswith("llasa: ")
    target = pretrained.load(dest)
    small = pretrained.load_draft(tmp_path / "draft", target)
    for path in ("table_0", "table_0_scale", "head", "head_scale"):
        assert small.params[path] is target.params[path]
    jax.tree.map(np.testing.assert_array_equal, small.params["layer_1"], target.params["layer_0"])
    convert(str(source), tmp_path / "floats")
    other = pretrained.load_draft(tmp_path / "draft", pretrained.load(tmp_path / "floats"))  # of another type: nothing is shared
    assert other.params["table_0"].dtype == np.int8


def test_a_draft_that_was_trained_for_it_loads_and_one_for_the_floats_does_not(llasa, tmp_path):
    source, dest = llasa
    target = pretrained.load(dest, "float32")
    config = eagle.Config(target.model.shape, (0, 1, 2), 3)
    own = eagle.init_params(jax.random.key(0), config, target.params)
    shared = dict(FAMILIES["eagle"].shared(config))
    description = DraftDescription("eagle", families.to_json(config), target.model.digest, shared)
    pretrained.save(tmp_path / "draft", description, with_shared(own, shared, target.params))
    draft = pretrained.load_draft(tmp_path / "draft", target)
    assert draft.params["target"]["head_scale"] is target.params["head_scale"]
    target = pretrained.with_features(target, draft.feature_layers)
    lm, options = pretrained.language_model(target), {"max_new_tokens": 12, "sampling": Sampling(temperature=0)}
    asked = (np.array([[313, 5, 7, 330]], np.int32), np.array([4], np.int32))
    fast = generate(jax.random.key(0), lm, target.params, draft.drafter(3), draft.params, verify.exact(), *asked, **options)
    assert fast.tokens.tolist() == autoregressive(jax.random.key(0), lm, target.params, *asked, **options).tokens.tolist()
    convert(str(source), tmp_path / "floats")
    with pytest.raises(ValueError, match=r"expected the target .* give the target that the draft was trained for"):
        pretrained.load_draft(tmp_path / "draft", pretrained.load(tmp_path / "floats"))


def test_values_that_are_not_finite_are_reported_and_nothing_is_written(llasa, tmp_path):
    checkpoints.llasa(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    state["model.embed_tokens.weight"][8, 2] = torch.nan
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    code, _, err = run("convert", tmp_path, tmp_path / "made", "--weights", "int8")
    assert code == 2
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert f"{name}: expected finite values, got NaN or infinity: download it again" in err
    assert not (tmp_path / "made").exists()


def test_a_matrix_of_another_shape_is_reported(tmp_path):
    checkpoints.llasa(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(3)
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 4)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    code, _, err = run("convert", tmp_path, tmp_path / "made", "--weights", "int8")
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight: expected shape (48, 80)" in err
    assert "model.layers.1.mlp.up_proj.weight: expected shape (48, 80)" in err


def test_a_family_without_a_table_for_int8_is_refused(tmp_path):
    (tmp_path / "snac").mkdir()
    checkpoints.snac(tmp_path / "snac")
    code, _, err = run("convert", tmp_path / "snac", tmp_path / "made", "--weights", "int8")
    assert code == 2
    assert err.splitlines() == [
        "jaxspec: expected --weights int8 for a language model, got it for the codec snac, which has no table for it: leave it "
        "out"
    ]
    with pytest.raises(ValueError, match="expected weights among float, int8, got 'int4'"):
        Options(weights="int4")


# --- drafts and training ------------------------------------------------------------------------------------------------------

TARGET, TARGET_FLOATS, TARGET_PARAMS = as_int8(Config((12, 5), 12, 32, 3, 4, 2, 8, 48, qk_norm=True))
LAYERS = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48}
DRAFTS = {
    "all of some layers": ("model", smaller.Config(TARGET, layers=(0, 2))),
    "some layers as they are": ("model", smaller.Config(TARGET, layers=(0, 2), trained=())),
    "block": ("block", block.Config(TARGET, (0, 3), 4, **LAYERS, markov_rank=6)),
    "recurrent": ("recurrent", recurrent.Config(TARGET, (0, 2), 4, 32, 24, attend=True)),
    "streaming": ("streaming", streaming.Config(TARGET, 4, layers=2, rank=6)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "recurrent" else name for name in DRAFTS])
def test_drafters_of_an_int8_target_have_float_weights_of_their_own(name):
    family, config = FAMILIES[DRAFTS[name][0]], DRAFTS[name][1]
    assert families.from_json(DRAFTS[name][0], json.loads(json.dumps(families.to_json(config))), "float32") == config
    own = family.init_params(jax.random.key(0), config, TARGET_PARAMS)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(own)} <= {"float32"}
    params = with_shared(own, family.shared(config), TARGET_PARAMS)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    batch = Packed(tokens, jnp.ones_like(tokens), tokens > 3)
    reads = dataclasses.replace(TARGET, feature_layers=family.feature_layers(config))
    features = Transformer(reads).apply({"params": TARGET_PARAMS}, tokens)[1]
    logits = family.logits(config, params, batch, features, jnp.array([[4, 6]], jnp.int32), 2)
    floats = dataclasses.replace(config, target=dataclasses.replace(TARGET, weights="float"))
    full = with_shared(own, family.shared(floats), dequantize(TARGET_PARAMS))
    np.testing.assert_allclose(logits, family.logits(floats, full, batch, features, jnp.array([[4, 6]], jnp.int32), 2), atol=2e-5)
    dense = flatten(dequantize(TARGET_PARAMS))
    if name in ("all of some layers", "block"):  # which start from the target's layers
        last = flatten(own)["layer_1/mlp/up/kernel"]
        np.testing.assert_array_equal(last, dense["layer_2/mlp/up/kernel"])


def test_int8_weights_are_not_trained():
    with pytest.raises(ValueError, match=r"all or nothing of the layers of an int8 target .*: int8 weights are not trained"):
        smaller.Config(TARGET, layers=(0, 2), trained=("layer_0", "head"))
    with pytest.raises(ValueError, match='expected float weights to train, got int8: leave weights = "int8" out'):
        loop.init_state(TARGET_PARAMS, loop.TrainConfig(1, 1.0))


# --- the built-in voice, and plans --------------------------------------------------------------------------------------------


def test_the_voice_in_int8_has_about_the_same_logits():
    own = voices.load()
    int8 = voices.quantized(own)
    assert int8.draft["shared"].items() >= {"target/head_scale": "head_scale", "target/table_1_scale": "table_1_scale"}.items()
    codes = np.random.default_rng(0).choice(np.flatnonzero(own.trained), (2, 30)).astype(np.int32)
    measured = precision(own, int8, ["one two", "three"], ["slt", "rms"], [codes[0], codes[1, :20]])
    assert 0.001 < measured.logit_error < 0.05
    assert measured.same_best > 0.8
    assert 0 < measured.total_variation < 0.05
    assert precision(own, own, ["one"], ["slt"], codes[:1]) == (0, 0, 1)
    np.testing.assert_allclose(int8.code_vectors("target"), own.code_vectors("target"), atol=0.02)
    with pytest.raises(ValueError, match="expected --draft builtin with --weights int8, got ngram"):
        Plan(weights="int8", draft="ngram")


def test_a_plain_step_of_llasa_8b_reads_about_half_the_bytes():
    shape = presets.pair("llasa-8b", "bfloat16").target
    int8 = dataclasses.replace(shape, weights="int8")
    ratio = roofline.model_pass(int8, 1, 1, 2048).bytes / roofline.model_pass(shape, 1, 1, 2048).bytes
    assert 0.5 < ratio < 0.55
    assert presets.parameter_bytes(int8) < 8.1e9
