"""Training of the codec of the voice: crops with their phones, losses and their gradients, encoded shards."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.codec import builtin
from jaxspec.train.voice import codec, corpus
from jaxspec.train.voice.corpus import Recording

SMALL = builtin.Config(2, (3, 3), encoder_width=8, width=8, coarse_blocks=1, fine_blocks=1)
STEP = SMALL.samples_per_code // codec.PHONES_PER_CODE
STEP_S = STEP / SMALL.sample_rate_hz


def recording(steps, voice="slt", seed=0):
    """Noise whose every step has a phone of its own: sample s has the value of its step, PHONES in turn."""
    names = [codec.PHONES[i % len(codec.PHONES)] for i in range(steps)]
    phones = [(name, (i + 1) * STEP_S) for i, name in enumerate(names)]
    level = 1000 * (1 + np.repeat(np.arange(steps) % len(codec.PHONES), STEP))
    return Recording("a.", voice, phones, level.astype(np.int16) * np.random.default_rng(seed).choice([-1, 1], STEP * steps))


def test_crops_come_with_the_phones_of_their_samples(tmp_path):
    for name in "ab":
        corpus.write_shard(tmp_path / f"{name}.npz", [recording(30, "slt"), recording(31, "rms"), recording(4)])
    for wave, voice, phones in itertools.islice(codec.batches(tmp_path, ["slt", "rms"], SMALL, 4, 8, 0), 5):
        assert wave.shape == (4, 8 * SMALL.samples_per_code)
        assert wave.dtype == np.float32
        assert set(voice) <= {0, 1}
        assert phones.shape == (4, 16)
        level = np.abs(wave[:, STEP // 2 :: STEP])  # of the middle of each step: proportional to 1 + its phone
        np.testing.assert_allclose(level / level[:, :1], (1 + phones) / (1 + phones[:, :1]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["codec", "decoder"])
def test_a_gradient_step_lowers_the_loss(kind):
    params = codec.init_params(jax.random.key(0), SMALL)
    wave = 0.1 * jax.random.normal(jax.random.key(1), (2, 8 * SMALL.samples_per_code), np.float32)
    batch = wave, jnp.array([0, 1], jnp.int32), jnp.zeros((2, 16), jnp.int32)
    if kind == "codec":
        loss, start = codec.loss(SMALL), params
    else:
        loss, start = codec.decoder_loss(SMALL, params["codec"]["encoder"]), params["codec"]["decoder"]
    step = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, jax.random.key(2))[0]))
    before, gradient = step(start)
    after, _ = step(jax.tree.map(lambda p, g: p - 1e-3 * g, start, gradient))
    assert after < before


def test_shards_are_encoded_recording_by_recording_and_kept(tmp_path):
    written = [recording(20), recording(5, "rms"), recording(11)]
    corpus.write_shard(tmp_path / "a.npz", written)
    params = codec.init_params(jax.random.key(0), SMALL)["codec"]
    assert list(codec.encode_shards(tmp_path, tmp_path / "out", params, SMALL)) == ["a.npz: 3 recordings"]
    encode = builtin.codec(SMALL).encode
    for before, after in zip(written, corpus.read_shard(tmp_path / "out" / "a.npz"), strict=True):
        assert after._replace(signal=None) == before._replace(signal=None)
        wave = before.signal[None].astype(np.float32) / 32768
        wave = np.pad(wave, ((0, 0), (0, -wave.shape[1] % SMALL.samples_per_code)))
        alone = encode(params, wave, np.array([len(before.signal)], np.int32))[0, :, 0]
        np.testing.assert_array_equal(after.signal, alone)
    assert list(codec.encode_shards(tmp_path, tmp_path / "out", params, SMALL)) == []
