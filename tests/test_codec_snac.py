"""SNAC's decoder against the package snac, from random weights by way of the conversion rules, and on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snac
import torch
from checkpoints import SNAC, folded, planned, snac_model

from jaxspec.codec.snac import Config, abstract_params, codec
from jaxspec.convert.snac import RULES, config

LARGE = SNAC | {"encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "latent_dim": None, "decoder_dim": 1024}
LARGE |= {"decoder_rates": [8, 8, 4, 2], "codebook_size": 4096, "codebook_dim": 8}
FRAMES, HOP = 5, 4 * 4 * 3 * 2
LEVELS = [[0], [1, 4], [2, 3, 5, 6]]  # where in Orpheus' frame of seven each codebook's codes are
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def reference():
    return snac_model()


def older(name):
    """A parameter's name as weight norm gave it before parametrizations."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")


def tensors_of(state):
    """The tensors of a state dict, weight norm folded."""
    return folded({name: value.numpy() for name, value in state.items()})


@pytest.fixture(scope="module")
def ours(reference):
    """Our codec and the reference's parameters in it."""
    tensors = tensors_of(reference.state_dict())
    settings, rules = config({name: tensor.shape for name, tensor in tensors.items()}, SNAC)
    return codec(settings), planned(tensors, rules, abstract_params(settings))


def frames(seed=0, rows=3, count=FRAMES):
    return np.random.default_rng(seed).integers(0, 16, (rows, count, 7), np.int32)


def expected(model, codes, noise, monkeypatch):
    """The reference's wave, its noise blocks given the noise [T 1] of each."""
    left = iter(noise)
    with_noise = lambda block, x: x + torch.tensor(next(left)(x.shape[-1])).T * block.linear(x)  # noqa: E731
    monkeypatch.setattr(snac.layers.NoiseBlock, "forward", with_noise)
    with torch.no_grad():
        return model.decode([torch.tensor(codes[:, :, level].reshape(len(codes), -1)) for level in LEVELS])[:, 0].numpy()


def test_wave_is_the_packages(reference, ours, monkeypatch):
    silence = [lambda steps: np.zeros((steps, 1), np.float32)] * 3
    wave = expected(reference, frames(), silence, monkeypatch)
    assert wave.shape == (3, FRAMES * HOP)
    assert 0.1 < wave.std() < 0.9
    np.testing.assert_allclose(ours[0].decode(ours[1], frames()), wave, atol=1e-5)


def test_wave_with_noise_is_the_packages_with_the_same(reference, ours, monkeypatch):
    noise = [lambda steps, key=key: np.array(jax.random.normal(key, (steps, 1))) for key in jax.random.split(KEY, 3)]
    wave = expected(reference, frames(), noise, monkeypatch)
    np.testing.assert_allclose(ours[0].decode(ours[1], frames(), None, KEY), wave, atol=1e-5)


def test_the_older_names_of_weight_norm_give_the_same(reference, ours):
    old = {older(name): value for name, value in reference.state_dict().items()}
    assert old.keys() != reference.state_dict().keys()
    jax.tree.map(np.testing.assert_array_equal, planned(tensors_of(old), RULES, ours[1]), ours[1])


@pytest.mark.parametrize("key", [None, KEY])
def test_a_row_is_the_same_alone_and_silent_beyond_its_end(ours, key):
    (_, decode, *_), params = ours
    codes, lengths = frames(), np.array([2, FRAMES, 0])
    waves = decode(params, codes, lengths, key)
    for row, length, wave in zip(codes, lengths, waves, strict=True):
        if length:
            alone = decode(params, row[None, :length], None, key)[0]
            np.testing.assert_allclose(wave[: length * HOP], alone, atol=1e-6)
        assert not wave[length * HOP :].any()


def test_noise_is_the_keys(ours):
    (_, decode, *_), params = ours
    first, again, other, without = (decode(params, frames(), None, key) for key in (KEY, KEY, jax.random.key(4), None))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).mean() > 0.01
    assert jnp.abs(first - without).mean() > 0.01


def test_a_frame_is_2048_samples():
    assert Config().slots == tuple(map(tuple, LEVELS))
    assert Config().samples_per_frame == 2048
    made = codec(Config())
    assert made.encode is None
    assert (made.sample_rate_hz, made.frame_rate_hz) == (24_000, 24_000 / 2048)
    assert codec(Config()) is made
    codes, length = jax.ShapeDtypeStruct((2, 12, 7), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    wave = jax.eval_shape(made.decode, abstract_params(Config()), codes, length)
    assert (wave.shape, wave.dtype) == ((2, 12 * 2048), jnp.float32)


def shapes_of(settings):
    """The shapes of a checkpoint of these settings, without its numbers."""
    with torch.device("meta"):
        state = snac.SNAC(**settings).state_dict()
    weights = {k.replace("parametrizations.weight.original1", "weight"): tuple(v.shape) for k, v in state.items()}
    return {name: shape for name, shape in weights.items() if not name.endswith("original0")}


def test_sizes_come_from_the_shapes():
    shapes = shapes_of(LARGE)
    assert config(shapes, None) == (Config(), RULES)
    planned(folded({name: np.zeros(shape, np.int8) for name, shape in shapes.items()}), RULES, abstract_params(Config()))
    strides = SNAC | {"sampling_rate": 8000, "vq_strides": [8, 2]}
    assert config(shapes_of(strides), strides)[0] == Config(12, 32, (4, 3, 2), 16, 5, (8, 2), 8000)


REFUSED = [
    ({"attn_window_size": 32, "decoder_dim": 128}, "without attention"),
    ({"noise": False}, "noise"),
    ({"depthwise": False}, "depthwise"),
    ({"vq_strides": [4, 3, 1]}, "vq_strides"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_what_is_not_supported_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        config(shapes_of(SNAC | change), SNAC | change)


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(ValueError, match="SNAC"):
        config({"model.norm.weight": (8,)}, None)
    with pytest.raises(ValueError, match="3 vq_strides"):
        config(shapes_of(SNAC), SNAC | {"vq_strides": [2, 1]})
