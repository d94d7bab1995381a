"""SNAC against the package snac, from random weights by way of the conversion rules, and on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import snac
import torch
from checkpoints import SNAC, folded, planned, snac_model

from jaxspec.codec import snac as snac_codec
from jaxspec.codec.snac import Config, abstract_params, codec
from jaxspec.convert.snac import config

LARGE = SNAC | {"encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024}
LARGE |= {"decoder_rates": [8, 8, 4, 2], "codebook_size": 4096, "codebook_dim": 8}
ENCODER = Config(encoder_rates=(2, 4, 8, 8))
FRAMES, HOP = 5, 4 * 4 * 3 * 2
LEVELS = [[0], [1, 4], [2, 3, 5, 6]]  # where in Orpheus' frame of seven each codebook's codes are
KEYS = jax.random.split(jax.random.key(3), 3)


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


def full(codes):
    return np.full(len(codes), codes.shape[1], np.int32)


def expected(model, codes, noise, monkeypatch):
    """The reference's wave, with the noise [B T 1] of each of its noise blocks given."""
    left = iter(noise)
    with_noise = lambda block, x: x + torch.tensor(np.array(next(left))).mT * block.linear(x)  # noqa: E731
    monkeypatch.setattr(snac.layers.NoiseBlock, "forward", with_noise)
    with torch.no_grad():
        return model.decode([torch.tensor(codes[:, :, level].reshape(len(codes), -1)) for level in LEVELS])[:, 0].numpy()


def test_wave_is_the_packages(reference, ours, monkeypatch):
    wave = expected(reference, frames(), [np.zeros((1, 1, 1), np.float32)] * 3, monkeypatch)
    assert wave.shape == (3, FRAMES * HOP)
    assert 0.1 < wave.std() < 0.9
    np.testing.assert_allclose(ours[0].decode(ours[1], frames(), full(frames()), None, None), wave, atol=1e-5)


def test_wave_with_noise_is_the_packages_with_the_same(reference, ours, monkeypatch):
    keys = [jax.vmap(jax.random.fold_in, (0, None))(KEYS, block) for block in range(3)]
    noise = [snac_codec.noise(keys[i], FRAMES, steps) for i, steps in enumerate((16, 48, 96))]
    wave = expected(reference, frames(), noise, monkeypatch)
    np.testing.assert_allclose(ours[0].decode(ours[1], frames(), full(frames()), None, KEYS), wave, atol=1e-5)


def compare_codes(model, made, params, wave, lengths):
    """Codes of a row equal up to where two cosines are nearly equal; returns the ties and the distinct codes of each book."""
    codes = np.asarray(made.encode(params, wave, lengths))
    frame = round(made.sample_rate_hz / made.frame_rate_hz)
    seen, ties = [set(), set(), set()], 0
    for row, length in enumerate(lengths):
        count = -(-length // frame)
        assert not codes[row, count:].any()
        with torch.no_grad():
            padded = model.preprocess(torch.tensor(wave[row : row + 1, :length])[None])
            residual = model.encoder(padded)
            for book, level, some in zip(model.quantizer.quantizers, LEVELS, seen, strict=True):
                pooled = torch.nn.functional.avg_pool1d(residual, book.stride, book.stride)
                unit = torch.nn.functional.normalize
                cosines = unit(book.in_proj(pooled)[0], dim=0).T @ unit(book.codebook.weight).T
                values, order = cosines.topk(2)
                near = (values[:, 0] - values[:, 1] < 1e-5).numpy()
                step, chosen = book(residual)
                np.testing.assert_array_equal(codes[row, :count][:, level].reshape(-1)[~near], order[~near, 0])
                ties, residual = ties + near.sum(), residual - step
                some |= set(chosen[0].tolist())
        theirs = model.encode(torch.tensor(wave[row : row + 1, :length])[None])
        if not ties:
            for level, book in zip(LEVELS, theirs, strict=True):
                np.testing.assert_array_equal(codes[row, :count][:, level].reshape(-1), book[0])
    return ties, list(map(len, seen))


def waves(count, rows, seed=0):
    """Loud noise, of which the codes differ."""
    generator = np.random.default_rng(seed)
    return (10 * generator.normal(size=(rows, count)) * np.exp(generator.normal(size=(rows, 1)))).astype(np.float32)


def test_codes_are_the_packages(reference, ours):
    lengths = np.array([FRAMES * HOP + 1, 1, FRAMES * HOP, HOP + 7], np.int32)
    ties, distinct = compare_codes(reference, *ours, waves(lengths.max(), 4), lengths)
    assert not ties
    assert min(distinct) > 3, distinct


@pytest.mark.slow
def test_codes_of_the_true_size_are_the_packages():
    torch.manual_seed(0)
    model = snac.SNAC(**LARGE).eval()
    tensors = tensors_of(model.state_dict())
    settings, rules = config({name: tensor.shape for name, tensor in tensors.items()}, LARGE)
    assert settings == ENCODER
    params = planned(tensors, rules, abstract_params(settings))
    ties, _ = compare_codes(model, codec(settings), params, waves(24_000, 2), np.array([24_000, 5000], np.int32))
    assert not ties


def test_noise_is_standard_normal_and_that_of_its_row_and_frame():
    drawn = snac_codec.noise(KEYS, 40, 250)
    assert drawn.shape == (3, 10_000, 1)
    assert drawn.dtype == jnp.float32
    assert scipy.stats.kstest(drawn[:, :, 0].ravel(), "norm").pvalue > 1e-6  # the rate of false alarms
    assert jnp.unique(drawn).size > 0.99 * drawn.size
    np.testing.assert_array_equal(snac_codec.noise(KEYS[1:2], 7, 250)[0], drawn[1, : 7 * 250])


def test_the_older_names_of_weight_norm_give_the_same(reference, ours):
    old = {older(name): value for name, value in reference.state_dict().items()}
    assert old.keys() != reference.state_dict().keys()
    tensors = tensors_of(old)
    _, rules = config({name: tensor.shape for name, tensor in tensors.items()}, SNAC)
    jax.tree.map(np.testing.assert_array_equal, planned(tensors, rules, ours[1]), ours[1])


def test_noise_of_a_row_is_its_own_with_keys_of_other_implementations(ours):
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 3)
    waves = ours[0].decode(ours[1], frames(), full(frames()), None, keys)
    alone = ours[0].decode(ours[1], frames()[1:2], full(frames())[:1], None, keys[1:2])
    np.testing.assert_allclose(waves[1], alone[0], atol=1e-5)


def test_noise_is_the_keys(ours):
    codes = frames()
    first, again, other, without = (
        ours[0].decode(ours[1], codes, full(codes), None, keys) for keys in (KEYS, KEYS, KEYS[::-1], None)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], other[1])
    assert jnp.abs(first[0] - other[0]).mean() > 0.01
    assert jnp.abs(first - without).mean() > 0.01


def test_a_frame_is_2048_samples():
    assert Config().slots == tuple(map(tuple, LEVELS))
    assert Config().samples_per_frame == 2048
    made = codec(Config())
    assert made.encode is None
    assert codec(ENCODER).encode is not None
    assert (made.sample_rate_hz, made.frame_rate_hz) == (24_000, 24_000 / 2048)
    assert codec(Config()) is made
    codes, length = jax.ShapeDtypeStruct((2, 12, 7), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    wave = jax.eval_shape(made.decode, abstract_params(Config()), codes, length, None, None)
    assert (wave.shape, wave.dtype) == ((2, 12 * 2048), jnp.float32)
    wave = jax.ShapeDtypeStruct((2, 24_000), jnp.float32)
    codes = jax.eval_shape(codec(ENCODER).encode, abstract_params(ENCODER), wave, length)
    assert (codes.shape, codes.dtype) == ((2, 12, 7), jnp.int32)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(abstract_params(some))) for some in (Config(), ENCODER)]
    assert sizes[1] - sizes[0] == pytest.approx(6.69e6, rel=0.01)


def shapes_of(settings):
    """The shapes of a checkpoint of these settings, without its numbers."""
    with torch.device("meta"):
        state = snac.SNAC(**settings).state_dict()
    weights = {k.replace("parametrizations.weight.original1", "weight"): tuple(v.shape) for k, v in state.items()}
    return {name: shape for name, shape in weights.items() if not name.endswith("original0")}


def test_sizes_come_from_the_shapes():
    shapes = shapes_of(LARGE)
    tensors = folded({name: np.zeros(shape, np.int8) for name, shape in shapes.items()})
    for encoder, wanted in ((True, ENCODER), (False, Config())):
        made, rules = config(shapes, None, encoder)
        assert made == wanted
        planned(tensors, rules, abstract_params(made))
    strides = SNAC | {"sampling_rate": 8000, "vq_strides": [8, 2]}
    assert config(shapes_of(strides), strides)[0] == Config(32, 32, (4, 3, 2), 16, 5, (8, 2), 8000, (2, 3, 4))


REFUSED = [
    ({"attn_window_size": 32, "decoder_dim": 128}, "without attention"),
    ({"noise": False}, "noise"),
    ({"depthwise": False}, "depthwise"),
    ({"vq_strides": [4, 3, 1]}, "vq_strides"),
    ({"encoder_rates": [2, 4, 4]}, "rate and width of the decoder"),
    ({"latent_dim": 12}, "rate and width of the decoder"),
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
