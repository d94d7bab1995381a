"""The HiFT vocoders against CosyVoice's, from random weights by way of the conversion rules, and on their own."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_hift
import torch
from checkpoints import folded, planned

from jaxspec.acoustic import hift
from jaxspec.acoustic.hift import V2, V3, abstract_params, vocoder
from jaxspec.convert.hift import config

FRAMES, BINS, SPAN = 16, reference_hift.TINY["in_channels"], 480
LENGTH = np.array([16, 9, 2, 0], np.int32)
KEYS = jax.random.split(jax.random.key(3), len(LENGTH))
BOTH = pytest.mark.parametrize("causal", [False, True])


def tensors_of(model):
    """Its arrays, but for those that the model of CosyVoice 3 keeps when it has run."""
    return {name: value.numpy() for name, value in model.state_dict().items() if "_exp_alpha" not in name}


def converted(state):
    """The config of the arrays of a state dict, and its parameters."""
    tensors = folded(state)
    made, rules = config({name: tensor.shape for name, tensor in tensors.items()})
    return made, planned(tensors, rules, abstract_params(made))


@pytest.fixture(scope="module")
def ours():
    """Of each version, the compiled functions, parameters, and the model that they are compared with."""
    found = {}
    for causal in (False, True):
        model = reference_hift.made(causal)
        settings, params = converted(tensors_of(model))
        found[causal] = vocoder(settings), params, model
    return found


def mels(frames=FRAMES, bins=BINS, length=LENGTH):
    """Rows with something else beyond their length."""
    mel = np.random.default_rng(0).normal(size=(len(length), frames, bins)).astype(np.float32)
    return np.where(np.arange(frames)[None, :, None] < length[:, None, None], mel, 1e3).astype(np.float32)


def noises(frames=FRAMES):
    return np.random.default_rng(1).normal(size=(len(LENGTH), SPAN * frames, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs(ours):
    """Of each version, the wave, source and pitch of each row alone, with noise."""
    rows = [(mel[:length], noise) for mel, noise, length in zip(mels(), noises(), LENGTH, strict=True) if length > 1]
    return {causal: [reference_hift.outputs(model, *row) for row in rows] for causal, (_, _, model) in ours.items()}


def compare(rows, expected, span, atol):
    """Each row of a batch with its part of what is expected, and 0 beyond."""
    for row, wanted, length in zip(np.asarray(rows), [*expected, np.zeros(0)], LENGTH, strict=True):
        np.testing.assert_allclose(row[: length * span], wanted, atol=atol)
        np.testing.assert_array_equal(row[length * span :], 0)


@BOTH
def test_pitch_is_cosyvoices(ours, theirs, causal):
    made, params, _ = ours[causal]
    pitches = [pitch for _, _, pitch in theirs[causal]]
    assert 20 < np.concatenate(pitches).std() < 100
    compare(made.f0(params, mels(), LENGTH), pitches, 1, 5e-4)


@BOTH
def test_source_is_cosyvoices(ours, theirs, causal):
    made, params, _ = ours[causal]
    f0 = np.zeros((len(LENGTH), FRAMES), np.float32)
    for row, (_, _, pitch) in zip(f0, theirs[causal], strict=False):
        row[: len(pitch)] = pitch
    rows = np.asarray(made.source(params, f0, noises()))
    for row, (_, source, _) in zip(rows, theirs[causal], strict=False):
        assert source.std() > 0.1
        np.testing.assert_allclose(row[: len(source)], source, atol=2e-5)


@BOTH
def test_decoded_source_is_cosyvoices_wave(ours, theirs, causal):
    made, params, _ = ours[causal]
    sources = np.full((len(LENGTH), SPAN * FRAMES), 10.0, np.float32)
    for row, (_, source, _) in zip(sources, theirs[causal], strict=False):
        row[: len(source)] = source
    waves = [wave for wave, _, _ in theirs[causal]]
    assert np.concatenate(waves).std() > 0.01
    compare(made.decode(params, mels(), LENGTH, sources), waves, SPAN, 5e-6)


@BOTH
def test_whole_way_is_cosyvoices(ours, theirs, causal):
    made, params, _ = ours[causal]
    sources = made.source(params, made.f0(params, mels(), LENGTH), noises())
    compare(made.decode(params, mels(), LENGTH, sources), [wave for wave, _, _ in theirs[causal]], SPAN, 1e-4)


@BOTH
def test_wave_is_the_whole_way_with_the_keys_noise(ours, causal):
    made, params, model = ours[causal]
    f0 = made.f0(params, mels(), LENGTH)
    drawn = hift.noise(config(shapes_of(model))[0], KEYS, jnp.zeros_like(LENGTH), FRAMES)
    for key, noise in ((None, None), (KEYS, drawn)):
        wave = np.asarray(made.wave(params, mels(), LENGTH, key))
        assert wave.shape == (len(LENGTH), FRAMES * SPAN)
        np.testing.assert_allclose(wave, made.decode(params, mels(), LENGTH, made.source(params, f0, noise)), atol=1e-5)


@BOTH
def test_a_rows_noise_is_its_own(ours, causal):
    made, params, _ = ours[causal]
    order = np.array([1, 0, 3, 2])
    first, other = (made.wave(params, mels()[i], LENGTH[i], KEYS[i]) for i in (np.arange(4), order))
    np.testing.assert_allclose(first[order], other, atol=1e-5)
    assert np.abs(first - made.wave(params, mels(), LENGTH, KEYS[::-1]))[0].max() > 1e-3


@BOTH
def test_magnitude_and_wave_are_clipped_as_cosyvoices(ours, causal):
    made, _, model = ours[causal]
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.conv_post.bias.add_(5)
    wanted, source, _ = reference_hift.outputs(loud, mels()[0], noises()[0])
    _, params = converted(tensors_of(loud))
    wave = np.asarray(made.decode(params, mels()[:1], LENGTH[:1], source[None]))
    np.testing.assert_allclose(wave[0], wanted, atol=1e-3)  # of magnitudes up to 100
    assert np.abs(wave).max() == np.float32(0.99)


def test_a_constant_mel_gives_a_constant_pitch_in_the_source(ours):
    made, params, _ = ours[False]
    mel = np.broadcast_to(np.linspace(-1, 1, BINS, dtype=np.float32), (len(LENGTH), FRAMES, BINS))
    length = np.full(len(LENGTH), FRAMES, np.int32)
    f0 = np.asarray(made.f0(params, mel, length))[0]
    np.testing.assert_allclose(f0[6:10], f0[6], rtol=1e-5)
    flat = np.full((len(LENGTH), FRAMES), f0[6])
    source = np.asarray(made.source(params, flat, None))[0]
    spectrum = np.abs(np.fft.rfft((source - source.mean()) * np.hanning(len(source)), 2**18))
    middle, sides = spectrum[1:-1], np.maximum(spectrum[:-2], spectrum[2:])
    peaks = np.flatnonzero((middle > sides) & (middle > 0.1 * spectrum.max()))
    multiples = (peaks + 1) * 24_000 / 2**18 / f0[6]
    assert len(multiples) > 2
    np.testing.assert_allclose(multiples, multiples.round(), atol=0.02)


def shapes_of(model):
    return {name: tensor.shape for name, tensor in folded(tensors_of(model)).items()}


def older(name):
    """A parameter's name as weight norm gave it before parametrizations."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")


@BOTH
def test_every_layout_gives_the_same(ours, causal):
    _, params, model = ours[causal]
    state = tensors_of(model)
    plain = {name: tensor.all() for name, tensor in folded(state).items()}
    assert len(plain) == 246
    old = {older(name): value for name, value in state.items()}
    for layout in (plain, old, {f"generator.{name}": value for name, value in state.items()}):
        assert layout.keys() != state.keys()
        jax.tree.map(np.testing.assert_array_equal, converted(layout)[1], params)


@pytest.mark.parametrize(("version", "count"), [(V2, 20.821e6), (V3, 20.780e6)])
def test_defaults_are_the_published_sizes(version, count):
    model = reference_hift.made(version.causal, tiny=False)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(count, abs=500)
    assert len(model.state_dict()) == 328
    settings, rules = config(shapes_of(model))
    assert settings == version
    planned(folded({name: np.zeros(shape, np.int8) for name, shape in shapes_of(model).items()}), rules, abstract_params(version))
    assert (version.samples_per_frame, version.frame_rate_hz) == (480, 50)
    assert vocoder(version) is vocoder(dataclasses.replace(version))


@pytest.mark.slow
@BOTH
def test_the_published_size_is_cosyvoices(causal):
    model, frames = reference_hift.made(causal, tiny=False), 40
    settings, params = converted(tensors_of(model))
    mel, noise = mels(frames, 80, np.array([frames])), noises(frames)[:1]
    wave, source, pitch = reference_hift.outputs(model, mel[0], noise[0])
    made, length = vocoder(settings), np.array([frames], np.int32)
    f0 = made.f0(params, mel, length)
    np.testing.assert_allclose(f0[0], pitch, atol=5e-4)
    np.testing.assert_allclose(made.decode(params, mel, length, source[None])[0], wave, atol=1e-5)
    np.testing.assert_allclose(made.decode(params, mel, length, made.source(params, f0, noise))[0], wave, atol=1e-4)


def test_bfloat16_is_near(ours):
    made, params, model = ours[False]
    half = vocoder(dataclasses.replace(config(shapes_of(model))[0], dtype="bfloat16"))
    np.testing.assert_array_equal(half.f0(params, mels(), LENGTH), made.f0(params, mels(), LENGTH))
    sources = made.source(params, made.f0(params, mels(), LENGTH), None)
    near, wave = half.decode(params, mels(), LENGTH, sources), made.decode(params, mels(), LENGTH, sources)
    assert near.dtype == jnp.float32
    assert 0 < jnp.square(near - wave).mean() < 0.01 * jnp.square(wave).mean()


def test_another_checkpoint_is_refused(ours):
    shapes = shapes_of(ours[False][2])
    with pytest.raises(ValueError, match=r"without conv_pre\.weight: give hift\.pt"):
        config({"model.norm.weight": (8,)})
    with pytest.raises(ValueError, match=r"without source_resblocks\.1\.convs1\.0\.weight"):
        config({name: shape for name, shape in shapes.items() if not name.startswith("source_resblocks.1.")})
    with pytest.raises(ValueError, match=r"3 upsamplings, got 7 and 2"):  # CosyVoice 1
        config({name: shape for name, shape in shapes.items() if not name.startswith("ups.2")})
    with pytest.raises(ValueError, match=r"3 axes of conv_post\.weight, got shape \(18, 2\)"):
        config(shapes | {"conv_post.weight": (18, 2)})


def test_a_truncated_checkpoint_is_refused(ours):
    state = tensors_of(ours[False][2])
    del state["resblocks.4.activations2.1.alpha"], state["ups.1.bias"]
    with pytest.raises(ValueError, match=r"resblocks_4/activations2_1/alpha: expected a tensor, got none.*\n.*ups_1/bias"):
        converted(state)
    del state["ups.0.parametrizations.weight.original0"]
    with pytest.raises(ValueError, match=r"magnitude and direction of ups\.0\.weight"):
        converted(state)
