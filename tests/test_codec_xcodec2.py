"""The decoders of X-codec2 and NeuCodec against transformers, from random weights in both layouts."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import XCODEC2, XCODEC2_KINDS, folded, planned, xcodec2_model
from reference_xcodec2 import WEIGHT_NORMS, original, tensors

from jaxspec.codec import xcodec2_encoder
from jaxspec.codec.xcodec2 import Config, Decoder, abstract_params, codec
from jaxspec.convert import xcodec2

SMALL = Config(width=64, layers=2, heads=4, head_dim=16, mlp_width=256, quantizer_width=128)


def converted(state):
    """(codec, parameters) of a checkpoint of the small size, without its encoder."""
    tensors = folded(state)
    config, rules = xcodec2.config({name: tensor.shape for name, tensor in tensors.items()}, XCODEC2, encoder=False)
    assert config.encoder is None
    return codec(config), planned(tensors, rules, abstract_params(config))


def decode(codec, params, codes):
    """The waves of rows without padding."""
    return codec.decode(params, codes, np.full(len(codes), codes.shape[1], np.int32), None, None)


def random_codes(*shape):
    return np.random.default_rng(1).integers(65_536, size=(*shape, 1), dtype=np.int32)


@pytest.mark.parametrize("count", [1, 23])
@pytest.mark.parametrize("kind", XCODEC2_KINDS)
def test_agrees_with_transformers(kind, count):
    ours, params = converted(tensors(kind))
    codes = random_codes(2, count)
    with torch.no_grad():
        theirs = xcodec2_model(kind).decode(torch.from_numpy(codes).mT.long()).audio_values[:, 0].numpy()
    wave = decode(ours, params, codes)
    assert 0.2 < theirs.std() < 0.6
    assert wave.shape == (2, count * {"X-codec2": 320, "NeuCodec": 480}[kind])
    assert (ours.sample_rate_hz, ours.frame_rate_hz) == ({"X-codec2": 16_000, "NeuCodec": 24_000}[kind], 50)
    np.testing.assert_allclose(wave, theirs, atol=1e-5)


@pytest.mark.parametrize("weight_norm", WEIGHT_NORMS)
def test_the_original_layout_says_the_same(weight_norm):
    codes, state = random_codes(1, 9), tensors("NeuCodec")
    ours, params = converted(state)
    again, same = converted(original(state, WEIGHT_NORMS[weight_norm]))
    assert again is ours
    np.testing.assert_allclose(decode(again, same, codes), decode(ours, params, codes), atol=5e-6)


def test_every_parameter_names_its_axes():
    variables = jax.eval_shape(Decoder(SMALL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    axes = jax.tree.map(lambda leaf, spec: (leaf.ndim, spec), abstract_params(SMALL), nn.get_partition_spec(variables["params"]))
    for rank, spec in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)):
        assert len(set(spec) - {None}) == rank


@pytest.mark.parametrize("kind", XCODEC2_KINDS)
def test_the_published_checkpoints_need_no_settings(kind):
    settings, model = XCODEC2_KINDS[kind]
    with torch.device("meta"):
        model = model(settings())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config, _ = xcodec2.config(shapes, None)
    decoder = {"X-codec2": Config(), "NeuCodec": Config(hop=480, sample_rate_hz=24_000)}[kind]
    margin = {"X-codec2": 160, "NeuCodec": 0}[kind]
    assert config == dataclasses.replace(decoder, encoder=xcodec2_encoder.Config(margin=margin))
    assert xcodec2.config(shapes, None, encoder=False)[0] == decoder
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert count == sum(p.numel() for p in model.parameters()) - model.semantic_encoder.masked_spec_embed.numel()
    parts = (model.acoustic_decoder, model.quantizer.project_out)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(decoder)))
    assert count == sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"acoustic_decoder.head.linear.weight": None}, {}, "expected the tensor"),
        ({"acoustic_decoder.head.linear.weight": (642, 64)}, {}, "1282 rows .* got 642"),
        ({"quantizer.project_out.weight": None}, {}, "project_out/kernel"),
        ({"acoustic_decoder.layers.0.mlp.fc1.weight": None}, {}, "layer_0/mlp/up/kernel"),
        ({}, {"num_attention_heads": 3}, "3 equal heads, got 64"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"quantization_levels": [8, 5, 5, 5]}, "quantization_levels"),
        ({}, {"semantic_model_config": {"position_embeddings_type": "rotary"}}, "position_embeddings_type"),
        ({"semantic_encoder.encoder.layers.0.ffn1.intermediate_dense.weight": None}, {}, "ffn1.intermediate_dense.weight"),
        ({"acoustic_encoder.block.4.conv1.weight": None}, {}, "product 320, got"),
    ],
)
def test_other_models_are_refused(change, settings, message):
    shapes = {name: value.shape for name, value in tensors("X-codec2").items()} | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        xcodec2.config(shapes, XCODEC2 | settings)


def test_settings_are_those_that_transformers_writes():
    settings = json.loads(xcodec2_model("NeuCodec").config.to_json_string())
    shapes = {name: value.shape for name, value in tensors("NeuCodec").items()}
    assert xcodec2.config(shapes, settings) == xcodec2.config(shapes, XCODEC2)
