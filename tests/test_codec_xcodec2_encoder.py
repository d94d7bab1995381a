"""The encoders of X-codec2 and NeuCodec against transformers, from random weights in both layouts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoints import SEMANTIC, XCODEC2, XCODEC2_KINDS, folded, planned, randomised_xcodec2, xcodec2_model
from reference_xcodec2 import WEIGHT_NORMS, assert_codes_agree, encoded, original, tensors

from jaxspec.codec import w2v_bert, xcodec2, xcodec2_encoder
from jaxspec.codec.padding import encode_rows
from jaxspec.convert import xcodec2 as table

SMALL = xcodec2_encoder.Config(w2v_bert.Config(64, 1, 4, 64, 3), 4, acoustic_width=64)
kinds = pytest.mark.parametrize("kind", XCODEC2_KINDS)


def tone(samples, seed=0):
    """The start of a second of harmonics that slide and swell, with bursts of noise: float32 [samples]."""
    rng, t = np.random.default_rng(seed), np.arange(16_000) / 16_000
    voiced = sum(np.sin(2 * np.pi * 110 * k * t + 9 * np.sin((4 + seed) * t)) / k for k in range(1, 20))
    bursts = np.repeat(10 ** rng.uniform(-3, -0.5, 20), 800)
    return (0.1 * voiced * np.sin(3 * t) ** 2 + bursts * rng.normal(size=16_000)).astype(np.float32)[:samples]


def converted(state, settings=XCODEC2):
    """(codec, its configuration, parameters) of a checkpoint of the small size."""
    tensors = folded(state)
    config, rules = table.config({name: tensor.shape for name, tensor in tensors.items()}, settings)
    return xcodec2.codec(config), config, planned(tensors, rules, xcodec2.abstract_params(config))


@functools.cache
def made(kind):
    return converted(tensors(kind))


@functools.cache
def reference(kind, samples, seed=0):
    return encoded(kind, xcodec2_model(kind), tone(samples, seed))


def bounded(coordinates):
    for _ in range(2):
        coordinates = 1.5015 * np.tanh(coordinates + np.arctanh(0.5 / 1.5015)) - 0.5
    return coordinates


def exact(function):
    return jax.default_matmul_precision("highest")(jax.jit(function))


@kinds
@pytest.mark.parametrize("samples", [8000, 8100, 400])  # a whole number of frames, a part of one, a word
def test_codes_are_those_of_transformers(kind, samples):
    codec, _, params = made(kind)
    theirs = reference(kind, samples)
    assert len(theirs.codes) == {"X-codec2": samples // 320 + 1, "NeuCodec": samples // 320}[kind]
    assert len(set(theirs.codes)) > 0.8 * len(theirs.codes)
    (codes,) = encode_rows(codec, params, [tone(samples)])
    assert codes.shape == (len(theirs.codes), 1)
    assert codes.dtype == np.int32
    assert_codes_agree(codes[:, 0], theirs)


@kinds
def test_both_branches_are_those_of_transformers(kind):
    _, config, params = made(kind)
    theirs, count, (encoder, own) = reference(kind, 8100), np.array([26], np.int32), (config.encoder, params["encoder"])
    wave = np.pad(tone(8100), (0, 220))[None]
    acoustic = exact(xcodec2_encoder.Acoustic(encoder).apply)({"params": own["acoustic"]}, wave, count)
    np.testing.assert_allclose(acoustic[0], theirs.acoustic, atol=1e-5)
    frames = xcodec2_encoder.frames(encoder, np.array([8100], np.int32))
    heard = exact(w2v_bert.features)(np.pad(wave, ((0, 0), 2 * (encoder.margin,))), frames)
    np.testing.assert_allclose(heard[0].reshape(-1, 80), theirs.features, atol=3e-5)
    hidden = exact(w2v_bert.Conformer(encoder.semantic).apply)
    of_theirs = hidden({"params": own["semantic"]}, theirs.features.reshape(1, -1, 160), frames)
    np.testing.assert_allclose(of_theirs[0], theirs.hidden, atol=1e-5)
    np.testing.assert_allclose(hidden({"params": own["semantic"]}, heard, frames)[0], theirs.hidden, atol=5e-5)


def test_positions_beyond_the_table_are_as_its_ends():
    """Over 100 frames, of which the table of distances covers 64 to the left and 8 to the right; several layers, in order."""
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**SEMANTIC | {"num_hidden_layers": 3})).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.normal_(float("norm" in name and name.endswith("weight")), 0.3 if value.ndim < 2 else value[0].numel() ** -0.5)
    state = {f"semantic_encoder.{name}": value.numpy() for name, value in theirs.state_dict().items()}
    state = {name: value for name, value in tensors("X-codec2").items() if not name.startswith("semantic_enc")} | state
    _, config, params = converted(state)
    assert config.encoder.semantic == w2v_bert.Config(64, 3, 4, 64, 31)
    features = np.random.default_rng(0).normal(size=(2, 100, 160)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(features)).last_hidden_state
    ours = exact(w2v_bert.Conformer(config.encoder.semantic).apply)
    full = np.full(2, 100, np.int32)
    np.testing.assert_allclose(ours({"params": params["encoder"]["semantic"]}, features, full), expected, atol=2e-5)


@pytest.mark.parametrize("snake", ["beta", "bias"])
@pytest.mark.parametrize("weight_norm", WEIGHT_NORMS)
def test_the_original_layout_says_the_same(weight_norm, snake):
    state = tensors("NeuCodec")
    codec, _, params = made("NeuCodec")
    again, _, same = converted(original(state, WEIGHT_NORMS[weight_norm], snake), None if weight_norm == "none" else XCODEC2)
    if weight_norm != "none":
        assert again is codec
    assert jax.tree.structure(same) == jax.tree.structure(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), same["encoder"], params["encoder"])


def test_of_the_original_conformer_the_first_16_layers_are_read():
    state = original(tensors("X-codec2"))
    names = [name for name in state if ".encoder.layers.0." in name]
    for i in range(1, 24):
        state |= {name.replace("layers.0.", f"layers.{i}."): state[name] + np.float32(i) for name in names}
    _, config, params = converted(state)
    assert config.encoder.semantic.layers == 16
    scales = params["encoder"]["semantic"]["layers"]["norm"]["scale"]
    np.testing.assert_allclose(scales - scales[:1], np.broadcast_to(np.arange(16)[:, None], (16, 64)), atol=1e-5)


def test_missing_and_misshapen_tensors_are_named():
    broken = {"semantic_adapter.conv3.bias": "adapter/conv3/bias: expected a tensor"}
    broken["semantic_encoder.encoder.layers.0.ffn2.output_dense.bias"] = "layers/ffn2/down/bias: expected a tensor"
    broken["acoustic_encoder.block.2.res_unit3.snake2.act.beta"] = "block_2_unit_2/snake2/beta: expected a tensor"
    with pytest.raises(ValueError, match="expected a tensor") as raised:
        converted({name: value for name, value in tensors("X-codec2").items() if name not in broken})
    assert all(message in str(raised.value) for message in broken.values())
    state = tensors("X-codec2")
    name = "semantic_encoder.encoder.layers.0.self_attn.linear_q.weight"
    with pytest.raises(ValueError, match=r"expected shape \(64, 64\) of encoder/semantic/layers/attention/query/kernel\[0\]"):
        converted(state | {name: state[name][:32]})


def test_a_checkpoint_of_the_decoder_alone_has_no_encoder():
    state = {
        name: value for name, value in tensors("X-codec2").items() if name.startswith(("acoustic_dec", "quantizer.project_out"))
    }
    codec, config, params = converted(state)
    assert config.encoder is codec.encode is None
    assert "encoder" not in params
    with pytest.raises(ValueError, match="only decodes"):
        encode_rows(codec, params, [tone(400)])


@kinds
def test_rows_of_a_batch_are_those_of_transformers_alone(kind):
    """Down to the coordinates that are rounded; what lies beyond a row is garbage."""
    codec, config, params = made(kind)
    lengths = np.array([3200, 2900, 640, 0, 1], np.int32)
    waves = np.stack([tone(3200, seed) for seed in range(len(lengths))])
    waves = np.where(np.arange(3200)[None] < lengths[:, None], waves, np.float32(np.nan))
    coordinates = exact(xcodec2_encoder.Encoder(config.encoder).apply)({"params": params["encoder"]}, waves, lengths)
    assert jnp.isfinite(coordinates).all()
    for row, length in enumerate(lengths):
        count = codec.encoded_frames(int(length))
        if length and count:
            theirs = reference(kind, int(length), row).bounded
            assert len(theirs) == count
            np.testing.assert_allclose(bounded(coordinates[row, :count]), theirs, atol=1e-4)


@pytest.mark.slow
@kinds
def test_the_true_size_agrees_with_transformers(kind):
    settings, model = XCODEC2_KINDS[kind]
    model = randomised_xcodec2(model(settings()))
    codec, config, params = converted({name: value.numpy() for name, value in model.state_dict().items()}, None)
    theirs = encoded(kind, model, tone(16_000))
    (codes,) = encode_rows(codec, params, [tone(16_000)])
    assert_codes_agree(codes[:, 0], theirs, 0.1)
    own, length = {"params": params["encoder"]}, np.array([16_000], np.int32)
    coordinates = exact(xcodec2_encoder.Encoder(config.encoder).apply)(own, tone(16_000)[None], length)[0]
    print(f"{kind}: {len(set(codes[:, 0]))} codes; difference {np.abs(bounded(coordinates) - theirs.bounded).max():.1e}")
    np.testing.assert_allclose(bounded(coordinates), theirs.bounded, atol=3e-4)


def test_the_codec_of_a_configuration_is_one_object():
    codec, config, _ = made("NeuCodec")
    assert xcodec2.codec(dataclasses.replace(config)) is codec
    assert (codec.sample_rate_hz, codec.encode_rate_hz, codec.frame_rate_hz) == (24_000, 16_000, 50)
    assert made("X-codec2")[0].encode_rate_hz == 16_000
    lower = [dataclasses.replace(config, encoder=encoder) for encoder in (None, SMALL)]
    assert xcodec2.codec(lower[0]).encode is None
    assert hash(xcodec2.codec(lower[1])) != hash(codec)


def test_every_parameter_names_its_axes():
    variables = jax.eval_shape(xcodec2_encoder.Encoder(SMALL).init, jax.random.key(0), jnp.zeros((1, 320)), jnp.full(1, 320))
    abstract = xcodec2_encoder.abstract_params(SMALL)
    axes = jax.tree.map(lambda leaf, spec: (leaf.ndim, spec), abstract, nn.get_partition_spec(variables["params"]))
    for rank, spec in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)):
        assert len(spec) == rank
        assert len(set(spec) - {None}) == sum(axis is not None for axis in spec)
