"""HiFT in pieces: a function of a cache and the next frames of mel gives the next samples, at fixed shapes.

``exact`` computes each frame with all that it depends on, so that the pieces joined are the wave of the whole mel. ``faded`` is
how CosyVoice 2 streams: it waits for fewer frames, starts the sines anew in each piece and fades from piece to piece.

A piece is computed in a window: frames that are kept from before, then the new ones, then padding. The window of a row's first
piece starts with the row; that of a later one is cut at its left, which only frames that are out already can tell.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.acoustic.hift import F0_LAYERS, F0_TAPS, POST_TAPS, Config, noise, vocoder
from jaxspec.acoustic.source import fraction
from jaxspec.codec import padding
from jaxspec.types import Array, Params

_FADED_FRAMES = 8


class Stream(NamedTuple):
    """Compiled functions; rows [B] are at the same or at different places of their utterances.

    Attributes:
        init: (batch) -> cache, a tree of arrays with B as their leading axis.
        step: (params, cache, mel float32 [B T mel_bins], length int32 [B], final bool [B], keys [B] | None)
            -> (wave float32 [B (held_frames + T)*samples_per_frame], samples int32 [B], cache).
            ``length`` frames of each row are valid, and ``final`` says that they are its last. The wave has ``samples`` valid
            samples, and 0 after them. The keys are those of the utterance, the same at each step.
        held_frames: how many frames at the end stay in the cache, until a later step or the final one gives their samples.
    """

    init: Any
    step: Any
    held_frames: int


class Window(NamedTuple):
    """What is kept of a row for its next piece.

    Attributes:
        mel: float32 [B K mel_bins].
        count: int32 [B], how many of the K frames there are.
        first: int32 [B], the index of the first of them in the utterance.
    """

    mel: Array
    count: Array
    first: Array


def _rows(x: Array, start: Array, size: int) -> Array:
    """``size`` elements of each row of [B N ...] from ``start`` int32 [B] on; 0 beyond its end."""
    padded = jnp.pad(x, ((0, 0), (0, size), *[(0, 0)] * (x.ndim - 2)))
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, size))(padded, start)


def _joined(window: Window, mel: Array) -> Array:
    """The kept frames of each row, and the new ones right after them: float32 [B K+T mel_bins]."""
    padded = jnp.pad(window.mel, ((0, 0), (0, mel.shape[1]), (0, 0)))
    return jax.vmap(lambda row, new, i: jax.lax.dynamic_update_slice_in_dim(row, new, i, 0))(padded, mel, window.count)


def _cut(wave: Array, start: Array, end: Array, span: int, frames: int) -> tuple[Array, Array]:
    """The samples of frames ``start`` to ``end`` int32 [B], 0 after them, and how many they are."""
    samples = (end - start) * span
    wave = _rows(wave, start * span, frames * span)
    return jnp.where(padding.valid(samples, wave.shape[1]), wave, 0), samples


@functools.lru_cache
def context_frames(config: Config) -> tuple[int, int]:
    """The receptive field: the frames of mel before and after one that its samples depend on, but for the phase of the sines.

    >>> context_frames(Config()), context_frames(Config(causal=True))
    ((21, 21), (37, 5))
    """
    c, span = config, config.samples_per_frame
    reach = -((c.n_fft // 2 - 1) // c.hop), (span - 1 + c.n_fft // 2) // c.hop  # steps of the STFT

    def wider(reach: tuple[int, int], *sides: tuple[int, int]) -> tuple[int, int]:
        before, after = map(sum, zip(*sides, strict=True))
        return reach[0] - before, reach[1] + after

    def block(reach: tuple[int, int], taps: int) -> tuple[int, int]:
        return wider(reach, *(c.sides(taps, d) for dilation in c.dilations for d in (dilation, 1)))

    def source(first: int, last: int) -> tuple[int, int]:
        frames = (first * c.hop - c.n_fft // 2) // span, (last * c.hop + c.n_fft // 2 - 1) // span
        frames = frames if c.causal else wider(frames, (1, 1))  # the lines between the phases of frames
        return wider(frames, *[c.sides(F0_TAPS)] * F0_LAYERS, c.f0_first_sides)

    seen = []
    reach = wider(reach, c.sides(POST_TAPS))
    for i in reversed(range(len(c.rates))):
        reach = block(reach, max(c.taps))
        first, last = block(reach, c.source_taps[i])
        stride, taps, (before, _) = c.down(i)
        seen.append(source(first * stride - before, last * stride - before + taps - 1))
        if i == len(c.rates) - 1:
            reach = reach[0] - 1, reach[1] - 1  # the reflected frame of the STFT
        reach = wider((reach[0] // c.rates[i], reach[1] // c.rates[i]), c.up_sides(i))
    seen.append(wider(reach, c.first_sides))
    return -min(first for first, _ in seen), max(last for _, last in seen)


class _Exact(NamedTuple):
    """The window; ``done`` int32 [B] of its frames are out; f0 float32 [B K] of frames whose pitch no later frame changes;
    phase uint32 [B], that of the fundamental before the first."""

    window: Window
    done: Array
    f0: Array
    phase: Array


@functools.lru_cache
def exact(config: Config) -> Stream:
    """The stream whose pieces joined are the wave of the whole mel; equal configs give the same object."""
    made, span = vocoder(config), config.samples_per_frame
    left, right = context_frames(config)
    f0_right = config.f0_first_sides[1] + F0_LAYERS * config.sides(F0_TAPS)[1]
    kept = left + right

    def init(batch: int) -> _Exact:
        none = jnp.zeros(batch, jnp.int32)
        window = Window(jnp.zeros((batch, kept, config.mel_bins)), none, none)
        return _Exact(window, none, jnp.zeros((batch, kept)), jnp.zeros(batch, jnp.uint32))

    @jax.jit
    def step(params: Params, cache: _Exact, mel: Array, length: Array, final: Array, key: Array | None) -> Any:
        window, frames = cache.window, kept + mel.shape[1]
        x, count = _joined(window, mel), window.count + length
        known = padding.valid(window.count - f0_right, frames)
        f0 = jnp.where(known, jnp.pad(cache.f0, ((0, 0), (0, mel.shape[1]))), made.f0(params, x, count))
        drawn = None if key is None else noise(config, key, window.first, frames)
        wave = made.decode(params, x, count, made.source(params, f0, drawn, cache.phase))
        done = jnp.where(final, count, jnp.maximum(count - right, cache.done))
        out = _cut(wave, cache.done, done, span, right + mel.shape[1])
        gone = jnp.maximum(done - left, 0)
        added = jnp.where(padding.valid(gone, frames), fraction(f0, config.frame_rate_hz), 0)
        phase = cache.phase + added.sum(axis=1, dtype=jnp.uint32)
        window = Window(_rows(x, gone, kept), count - gone, window.first + gone)
        return *out, _Exact(window, done - gone, _rows(f0, gone, kept), phase)

    return Stream(init, step, right)


class _Faded(NamedTuple):
    """The window; the source and the wave of its frames, float32 [B K*samples_per_frame]."""

    window: Window
    source: Array
    wave: Array


@functools.lru_cache
def faded(config: Config) -> Stream:
    """The stream of CosyVoice 2's program; equal configs give the same object.

    A step that is not final needs 8 frames at least. The source of the kept frames is that of the piece before; their wave goes
    from that piece to this one by a Hamming window.
    """
    made, span, kept = vocoder(config), config.samples_per_frame, _FADED_FRAMES
    rise, fall = np.split(np.hamming(2 * kept * span).astype(np.float32), 2)

    def init(batch: int) -> _Faded:
        none, samples = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, kept * span))
        return _Faded(Window(jnp.zeros((batch, kept, config.mel_bins)), none, none), samples, samples)

    @jax.jit
    def step(params: Params, cache: _Faded, mel: Array, length: Array, final: Array, key: Array | None) -> Any:
        window, frames = cache.window, kept + mel.shape[1]
        x, count = _joined(window, mel), window.count + length
        drawn = None if key is None else noise(config, key, window.first, frames)
        source = made.source(params, made.f0(params, x, count), drawn)
        old = padding.valid(window.count * span, kept * span)
        source = source.at[:, : kept * span].set(jnp.where(old, cache.source, source[:, : kept * span]))
        wave = made.decode(params, x, count, source)
        faded = wave[:, : kept * span] * rise[None] + cache.wave * fall[None]
        wave = wave.at[:, : kept * span].set(jnp.where(old, faded, wave[:, : kept * span]))
        done = jnp.where(final, count, count - kept)
        out = _cut(wave, jnp.zeros_like(done), done, span, frames)
        window = Window(_rows(x, done, kept), count - done, window.first + done)
        return *out, _Faded(window, *(_rows(y, done * span, kept * span) for y in (source, wave)))

    return Stream(init, step, kept)
