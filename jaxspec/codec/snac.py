"""The decoder of SNAC, whose codebooks have different rates (arXiv 2410.14411): frames of codes to waves, as Orpheus needs.

    codes -> vectors, repeated for their strides, summed -> [x8, x8, x4, x2: transposed convolution, noise, residuals] -> wave

Every convolution has zeros for input beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import padding
from jaxspec.keys import threefry_key
from jaxspec.types import Array, Codec, Condition, Params

_TAPS = 7
_DILATIONS = (1, 3, 9)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the decoder; the defaults are those of the 24 kHz checkpoint.

    decoder_rates: the upsampling factor of each block, which also halves the channels.
    strides: how many latent steps a code of each codebook spans, coarsest first; the first is a frame.
    """

    latent_width: int = 768
    decoder_dim: int = 1024
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = 4096
    codebook_dim: int = 8
    strides: tuple[int, ...] = (4, 2, 1)
    sample_rate_hz: int = 24_000

    @property
    def samples_per_frame(self) -> int:
        """Samples of wave for each frame of codes."""
        return self.strides[0] * math.prod(self.decoder_rates)

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """The places in a frame of each codebook's codes, which are ordered by start time, coarse before fine.

        >>> Config().slots
        ((0,), (1, 4), (2, 3, 5, 6))
        """
        order = sorted((start, book) for book, s in enumerate(self.strides) for start in range(0, self.strides[0], s))
        return tuple(tuple(i for i, (_, of) in enumerate(order) if of == book) for book in range(len(self.strides)))

    @property
    def context_frames(self) -> tuple[int, int]:
        """The decoder's receptive field: the steps that a frame's samples depend on, from the last layer to the first.

        >>> Config().context_frames
        (3, 3)
        """
        first, last = -(_TAPS // 2), self.samples_per_frame - 1 + _TAPS // 2
        for stride in reversed(self.decoder_rates):
            side = _TAPS // 2 * sum(_DILATIONS)
            first = (first - side + -(-stride // 2)) // stride - 1
            last = (last + side + -(-stride // 2)) // stride
        return -((first - _TAPS // 2) // self.strides[0]), (last + _TAPS // 2) // self.strides[0]


def noise(keys: Array, frames: int, steps: int) -> Array:
    """Standard normal noise whose values for a frame depend on the row's key and the frame's index alone.

    Args:
        keys: threefry keys [B], one for each row.
        frames: how many frames.
        steps: values for each frame.

    Returns:
        float32 [B frames*steps 1].
    """

    def draw(key: Array, frame: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, frame), (steps,), jnp.float32)

    drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, jnp.arange(frames, dtype=jnp.uint32))
    return drawn.reshape(-1, frames * steps, 1)


def _masked(x: Array, length: Array) -> Array:
    """[B T C] with zeros from each row's ``length`` on."""
    return jnp.where(padding.valid(length, x.shape[1])[:, :, None], x, 0)


def _dot(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _kernel(axes: tuple[str | None, ...]) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


def _per_channel(value: float) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.constant(value), ("channels",))


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, with an alpha for each channel (arXiv 2006.08195)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T C]."""
        alpha = self.param("alpha", _per_channel(1.0), (x.shape[-1],))
        alpha = alpha[None, None]
        return x + jnp.sin(alpha * x) ** 2 / (alpha + 1e-9)


class Pointwise(nn.Module):
    """A convolution of one tap."""

    channels: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T channels]."""
        y = _dot(x, self.param("kernel", _kernel(("channels_in", "channels")), (x.shape[-1], self.channels)))
        return y + self.param("bias", _per_channel(0.0), (self.channels,))[None, None] if self.bias else y


class Depthwise(nn.Module):
    """Seven taps for each channel by itself, as a sum of shifted products: XLA is slow at grouped convolutions on CPU."""

    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        kernel = self.param("kernel", _kernel((None, "channels")), (_TAPS, x.shape[-1]))
        side, steps = _TAPS // 2 * self.dilation, x.shape[1]
        padded = jnp.pad(_masked(x, length), ((0, 0), (side, side), (0, 0)))
        shifted = (padded[:, i * self.dilation :][:, :steps] * kernel[i][None, None] for i in range(_TAPS))
        return sum(shifted) + self.param("bias", _per_channel(0.0), x.shape[-1:])[None, None]


class Up(nn.Module):
    """A transposed convolution of 2 * stride taps, as a product and an overlap-add."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T*stride channels]."""
        batch, steps, width = x.shape
        kernel = self.param("kernel", _kernel(("channels_in", None, "channels")), (width, 2 * self.stride, self.channels))
        y = _dot(_masked(x, length), kernel.reshape(width, -1)).reshape(batch, steps, 2, self.stride, self.channels)
        y = jnp.pad(y[:, :, 0], ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(y[:, :, 1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        y = y.reshape(batch, -1, self.channels)[:, -(-self.stride // 2) :][:, : steps * self.stride]
        return y + self.param("bias", _per_channel(0.0), (self.channels,))[None, None]


class Residual(nn.Module):
    """x + pointwise(snake(depthwise(snake(x))))."""

    dilation: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        y = Depthwise(self.dilation, name="depthwise")(Snake(name="snake_in")(x), length)
        return x + Pointwise(x.shape[-1], name="pointwise")(Snake(name="snake_out")(y))


class Block(nn.Module):
    """Upsampling by ``stride``, noise with a gain that depends on the signal, and residual units."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array, drawn: Array | None) -> Array:
        """[B T C], of which ``length`` int32 [B] steps are valid, noise [B T*stride 1] -> [B T*stride channels]."""
        x = Up(self.channels, self.stride, name="up")(Snake(name="snake")(x), length)
        gain = Pointwise(self.channels, bias=False, name="noise")(x)
        if drawn is not None:
            x = x + drawn * gain
        for i, dilation in enumerate(_DILATIONS):
            x = Residual(dilation, name=f"residual_{i + 3}")(x, length * self.stride)
        return x


class Codebook(nn.Module):
    """Codes to latent vectors."""

    config: Config

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        """int32 [B T] -> [B T latent_width]."""
        c = self.config
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codes", None))
        vectors: Any = self.param("vectors", normal, (c.codebook_size, c.codebook_dim))
        return Pointwise(c.latent_width, name="out")(vectors[codes])


class Head(nn.Module):
    """The last convolution, to one channel, as a product for each tap and the sum of their shifts."""

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T]."""
        taps = _dot(_masked(x, length), self.param("kernel", _kernel(("channels_in", None)), (x.shape[-1], _TAPS)))
        padded = jnp.pad(taps, ((0, 0), (_TAPS // 2, _TAPS // 2), (0, 0)))
        shifted = (padded[:, i:, i][:, : x.shape[1]] for i in range(_TAPS))
        bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (1,))
        return sum(shifted) + bias[None]


class Decoder(nn.Module):
    """Frames of codes to a wave. Blocks and residual units are numbered as in the checkpoint."""

    config: Config

    @nn.compact
    def __call__(self, codes: Array, length: Array, key: Array | None) -> Array:
        """codes int32 [B T Q], length int32 [B], PRNG keys [B] of any kind | None -> float32 [B T*samples_per_frame]."""
        c, (batch, frames, _) = self.config, codes.shape
        keys = None if key is None else threefry_key(key)
        x: Any = 0.0  # a sum over the codebooks
        length, rate = length * c.strides[0], c.strides[0]
        for i, (slots, stride) in enumerate(zip(c.slots, c.strides, strict=True)):
            vectors = Codebook(c, name=f"codebook_{i}")(codes[:, :, np.array(slots)].reshape(batch, -1))
            x = x + jnp.repeat(vectors, stride, axis=1)
        x = Pointwise(c.decoder_dim, name="pointwise")(Depthwise(name="depthwise")(x, length))
        for i, stride in enumerate(c.decoder_rates):
            rate *= stride
            drawn = None if keys is None else noise(jax.vmap(jax.random.fold_in, (0, None))(keys, i), frames, rate)
            x = Block(x.shape[-1] // 2, stride, name=f"block_{i + 2}")(x, length, drawn)
            length = length * stride
        wave = jnp.tanh(Head(name="head")(Snake(name="snake")(x), length))
        return jnp.where(padding.valid(length, wave.shape[1]), wave, 0)


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The decoder as a ``jaxspec.types.Codec`` without an encoder, compiled; equal configs give the same object.

    A row has the codes of all codebooks for each frame [T Q], in the order of ``Config.slots``. ``condition`` is ignored. ``key``
    draws the noise that the blocks add, which depends on the row's key and the frame's index; without it there is none.
    """
    decoder = Decoder(config)

    def decode(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        wave: Any = decoder.apply({"params": params}, codes, length, key)
        return wave

    rate = config.sample_rate_hz
    return Codec(None, jax.jit(decode), rate, rate / config.samples_per_frame, config.context_frames)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    codes = jnp.zeros((1, 1, sum(map(len, config.slots))), jnp.int32)
    variables = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), codes, jnp.ones(1, jnp.int32), None))
    return nn.meta.unbox(variables["params"])
