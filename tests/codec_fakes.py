"""Codecs of the kinds that are to come, small: a flow with a vocoder, a causal codec, a recurrent one, one that looks ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import padding
from jaxspec.types import Codec

VOCAB, WIDTH, SPAN = 16, 8, 5  # codes of a book, channels, samples of a frame
RATE_HZ = 100


def params(seed, taps=1, books=1):
    """Vectors of codes, a kernel and a head to samples."""
    vectors, kernel, head = jax.random.split(jax.random.key(seed), 3)
    return {
        "vectors": jax.random.normal(vectors, (books, VOCAB, WIDTH)),
        "kernel": jax.random.normal(kernel, (taps, WIDTH, WIDTH)) / taps,
        "head": jax.random.normal(head, (WIDTH, SPAN)),
    }


def _embed(params, codes):
    return sum(params["vectors"][book][codes[:, :, book] % VOCAB] for book in range(codes.shape[2]))


def _convolve(kernel, x, mask, left):
    """The sum of ``kernel[i]`` times the step ``i - left`` away."""
    taps, count = kernel.shape[0], x.shape[1]
    padded = jnp.pad(jnp.where(mask, x, 0), ((0, 0), (left, taps - 1 - left), (0, 0)))
    return sum(padded[:, i : i + count] @ kernel[i] for i in range(taps))


def _samples(params, x, mask):
    return jnp.where(mask, jnp.tanh(x @ params["head"]), 0).reshape(x.shape[0], -1)


@functools.lru_cache
def convolutional(left, right):
    """Convolutions over ``left`` and ``right`` frames; two books; causal where right is 0. It encodes too."""

    def encode(params, wave, length):
        heard = jnp.where(padding.valid(length, wave.shape[1]), wave, 0).reshape(wave.shape[0], -1, SPAN)
        codes = jnp.argmax(jnp.einsum("btn,kn->btk", heard, params["head"]), -1).astype(jnp.int32)
        mask = padding.valid(-(-length // SPAN), codes.shape[1])
        return jnp.where(mask, codes, 0)[:, :, None].repeat(2, 2)

    def decode(params, codes, length, condition, key):
        mask = padding.valid(length, codes.shape[1])[:, :, None]
        return _samples(params, _convolve(params["kernel"], _embed(params, codes), mask, left), mask)

    return Codec(jax.jit(encode), jax.jit(decode), RATE_HZ, RATE_HZ / SPAN, (left, right))


@functools.lru_cache
def recurrent():
    """A state that decays from frame to frame: all frames to the left, none to the right."""

    def decode(params, codes, length, condition, key):
        mask = padding.valid(length, codes.shape[1])[:, :, None]
        x = jnp.where(mask, _embed(params, codes), 0).swapaxes(0, 1)
        step = lambda state, now: (0.9 * state + now,) * 2  # noqa: E731
        _, states = jax.lax.scan(step, jnp.zeros_like(x[0]), x)
        return _samples(params, states.swapaxes(0, 1), mask)

    return Codec(None, jax.jit(decode), RATE_HZ, RATE_HZ / SPAN, (None, 0))


@functools.lru_cache
def flow_and_vocoder(steps=3):
    """Noise that steps along a field which sees the whole row and what it is to sound like, then a convolution to samples.

    condition: {"speaker": [B WIDTH], "prompt": [B P WIDTH], "prompt_length": int32 [B]}.
    """

    def noise(key, frame):
        return jax.random.normal(jax.random.fold_in(key, frame), (WIDTH,), jnp.float32)

    def decode(params, codes, length, condition, key):
        mask = padding.valid(length, codes.shape[1])[:, :, None]
        prompted = padding.valid(condition["prompt_length"], condition["prompt"].shape[1])[:, :, None]
        prompt = jnp.where(prompted, condition["prompt"], 0).sum(1)
        given = _embed(params, codes) + (condition["speaker"] + prompt)[:, None]
        x = jnp.zeros(given.shape, np.float32)
        if key is not None:
            frames = jnp.arange(codes.shape[1], dtype=np.uint32)
            x = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(key, frames)
        for _ in range(steps):
            seen = jnp.where(mask, x + given, 0).sum(1) / jnp.maximum(length, 1)[:, None].astype(np.float32)
            x = x + jnp.tanh(given - x + seen[:, None]) / steps
        return _samples(params, _convolve(params["kernel"], x, mask, 1), mask)

    return Codec(None, jax.jit(decode), RATE_HZ, RATE_HZ / SPAN, (None, None))


def flow_condition(rows):
    """Conditions of ``rows`` rows, whose prompts differ in length."""
    rng = np.random.default_rng(5)
    return {
        "speaker": rng.normal(size=(rows, WIDTH)).astype(np.float32),
        "prompt": rng.normal(size=(rows, 4, WIDTH)).astype(np.float32),
        "prompt_length": (np.arange(rows) % 5).astype(np.int32),
    }
