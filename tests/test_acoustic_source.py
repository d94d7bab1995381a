"""The harmonic source: exact phases for as long as one likes, against CosyVoice's in float64, and its noise."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_hift
import scipy.stats
import torch

from jaxspec.acoustic import source

KEYS = jax.random.split(jax.random.key(3), 3)
NONE = np.zeros(1, np.uint32)


@pytest.mark.parametrize("rate", [50, 24_000, 7, 65_535])
def test_fraction_of_a_cycle_is_that_of_whole_numbers(rate):
    hz = np.random.default_rng(0).uniform(8, 1e4, 1000).astype(np.float32)
    hz = np.concatenate([hz, np.float32([0, 10, rate, 3 * rate, 0.5 * rate, 2.0**-10])])
    resolution = 2 ** (32 - rate.bit_length())
    cut = [Fraction(int(Fraction(float(f)) % rate * resolution), resolution) for f in hz]
    np.testing.assert_array_equal(
        source.fraction(jnp.asarray(hz), rate), np.array([int(f / rate * 2**32) for f in cut], np.uint32)
    )


def pitches(frames):
    """A slide with unvoiced parts, and a constant pitch."""
    time = np.arange(frames)
    slide = np.where(time // 50 % 3 == 1, 4.0, 200 + 150 * np.sin(time / 40) + np.random.default_rng(0).normal(size=frames))
    return np.stack([slide, np.full(frames, 220.7)]).astype(np.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_thirty_seconds_are_exact(causal):
    f0, model = pitches(1500), reference_hift.made(causal)
    made = source.excitation(source.sines(f0, np.zeros(2, np.uint32), 9, 480, 24_000, causal), f0, None)
    assert (made.shape, made.dtype) == ((2, 720_000, 9), jnp.float32)
    steps = torch.tensor(f0)[:, :, None].repeat_interleave(480, 1)
    for row, pitch in zip(np.asarray(made), steps, strict=True):
        with reference_hift.noise_of(model, None), reference_hift.in_float64(model):
            np.testing.assert_allclose(row, model.m_source.l_sin_gen(pitch[None])[0][0], atol=3e-6)  # of .1


@pytest.mark.parametrize("causal", [False, True])
def test_sines_go_on_where_they_stopped(causal):
    f0 = pitches(40)
    whole = source.sines(f0, np.zeros(2, np.uint32), 3, 480, 24_000, causal)
    phase = source.fraction(jnp.asarray(f0[:, :25]), 50).sum(axis=1, dtype=jnp.uint32)
    rest = source.sines(f0[:, 25:], phase, 3, 480, 24_000, causal)
    np.testing.assert_array_equal(whole[:, 25 * 480 + 240 :], rest[:, 240:])  # the first line starts a frame before


def test_a_pitch_is_its_sine():
    time = 1 / 50 + (np.arange(480 * 9) + 0.5) / 24_000  # after the middle of the first frame
    made = source.sines(np.full((1, 10), 123.0, np.float32), NONE, 2, 480, 24_000, held=False)
    wanted = np.stack([np.sin(2 * np.pi * 123 * h * time) for h in (1, 2)], axis=1)
    np.testing.assert_allclose(made[0, 240:-240], wanted, atol=1e-5)
    np.testing.assert_array_equal(made[0, :240], made[0, :1].repeat(240, axis=0))
    held = source.sines(np.full((1, 10), 123.0, np.float32), NONE, 2, 480, 24_000, held=True)
    np.testing.assert_allclose(held[0, 480 * 3 : 480 * 4, 0], np.sin(2 * np.pi * 123 * 4 / 50), atol=1e-6, rtol=0)


def test_noise_is_louder_where_there_is_no_voice():
    f0, drawn = np.float32([[10.5, 10.0]]), np.ones((1, 8, 2), np.float32)
    made = source.excitation(np.full((1, 8, 2), 0.5, np.float32), f0, drawn)
    np.testing.assert_allclose(made[0, :, 0], [0.053] * 4 + [0.1 / 3] * 4, rtol=1e-6)


@pytest.mark.parametrize(("uniform", "law"), [(False, "norm"), (True, "uniform")])
def test_noise_is_that_of_its_row_and_frame(uniform, law):
    first = np.array([0, 3, 7], np.int32)
    drawn = np.asarray(source.noise(KEYS, first, 5, 480, 9, uniform))
    assert drawn.shape == (3, 5 * 480, 9)
    assert scipy.stats.kstest(drawn.ravel(), law).pvalue > 1e-6  # the rate of false alarms
    assert np.unique(drawn).size > 0.98 * drawn.size
    later = source.noise(KEYS[1:2], first[1:2] + 2, 2, 480, 9, uniform)
    np.testing.assert_array_equal(later[0], drawn[1, 2 * 480 : 4 * 480])


def test_published_noise_is_what_torch_draws_after_the_rest():
    generator = torch.Generator().manual_seed(0)
    torch.rand(5_052_961 + 9, generator=generator)
    np.testing.assert_array_equal(source.published_noise(1000), torch.rand(1000, 9, generator=generator).numpy())
