"""SNAC, whose codebooks have different rates (arXiv 2410.14411): frames of codes to waves, as Orpheus needs, and back.

    codes -> vectors, repeated for their strides, summed -> [x8, x8, x4, x2: transposed convolution, noise, residuals] -> wave
    wave -> [/2, /4, /8, /8: residuals, convolution] -> each codebook: mean over its stride, nearest vector, minus this -> codes

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
from jaxspec.codec.layers import constant, lecun
from jaxspec.keys import threefry_key
from jaxspec.types import Array, Codec, Condition, Params

_TAPS = 7
_DILATIONS = (1, 3, 9)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the codec; the defaults are those of the 24 kHz checkpoint, without its encoder.

    decoder_rates: the upsampling factor of each block, which also halves the channels.
    encoder_rates: the downsampling factor of each block, which also doubles the channels, with the product of ``decoder_rates``;
        () is without an encoder.
    strides: how many latent steps a code of each codebook spans, coarsest first; the first is a frame.
    """

    latent_width: int = 768
    decoder_dim: int = 1024
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = 4096
    codebook_dim: int = 8
    strides: tuple[int, ...] = (4, 2, 1)
    sample_rate_hz: int = 24_000
    encoder_rates: tuple[int, ...] = ()

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


def _dot(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, with an alpha for each channel (arXiv 2006.08195)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T C]."""
        alpha = self.param("alpha", constant(1.0, "channels"), (x.shape[-1],))
        alpha = alpha[None, None]
        return x + jnp.sin(alpha * x) ** 2 / (alpha + 1e-9)


class Pointwise(nn.Module):
    """A convolution of one tap."""

    channels: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T channels]."""
        y = _dot(x, self.param("kernel", lecun("channels_in", "channels"), (x.shape[-1], self.channels)))
        return y + self.param("bias", constant(0.0, "channels"), (self.channels,))[None, None] if self.bias else y


class Depthwise(nn.Module):
    """Seven taps for each channel by itself, as a sum of shifted products: XLA is slow at grouped convolutions on CPU."""

    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        kernel = self.param("kernel", lecun(None, "channels"), (_TAPS, x.shape[-1]))
        side, steps = _TAPS // 2 * self.dilation, x.shape[1]
        padded = jnp.pad(padding.masked(x, length), ((0, 0), (side, side), (0, 0)))
        shifted = (padded[:, i * self.dilation :][:, :steps] * kernel[i][None, None] for i in range(_TAPS))
        return sum(shifted) + self.param("bias", constant(0.0, "channels"), x.shape[-1:])[None, None]


class Up(nn.Module):
    """A transposed convolution of 2 * stride taps, as a product and an overlap-add."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T*stride channels]."""
        batch, steps, width = x.shape
        kernel = self.param("kernel", lecun("channels_in", None, "channels"), (width, 2 * self.stride, self.channels))
        y = _dot(padding.masked(x, length), kernel.reshape(width, -1)).reshape(batch, steps, 2, self.stride, self.channels)
        y = jnp.pad(y[:, :, 0], ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(y[:, :, 1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        y = y.reshape(batch, -1, self.channels)[:, -(-self.stride // 2) :][:, : steps * self.stride]
        return y + self.param("bias", constant(0.0, "channels"), (self.channels,))[None, None]


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
    """Codes to latent vectors, and back."""

    config: Config

    def setup(self) -> None:
        """Defines the parameters."""
        c = self.config
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codes", None))
        self.vectors: Any = self.param("vectors", normal, (c.codebook_size, c.codebook_dim))
        self.out = Pointwise(c.latent_width)
        self.into = Pointwise(c.codebook_dim)  # of the encoder

    def __call__(self, codes: Array) -> Array:
        """int32 [B T] -> [B T latent_width]."""
        return self.out(self.vectors[codes])

    def nearest(self, x: Array) -> Array:
        """The codes of the vectors of the largest cosine, the first of equal ones: [B T latent_width] -> int32 [B T]."""
        x, vectors = (y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12) for y in (self.into(x), self.vectors))
        return jnp.argmax(_dot(x, vectors.T), -1).astype(jnp.int32)


class Head(nn.Module):
    """The last convolution, to one channel, as a product for each tap and the sum of their shifts."""

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T]."""
        taps = _dot(padding.masked(x, length), self.param("kernel", lecun("channels_in", None), (x.shape[-1], _TAPS)))
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


class Down(nn.Module):
    """A convolution of 2 * stride taps and this stride, as the sum of two products."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T/stride channels]."""
        batch, _, width = x.shape
        kernel = self.param("kernel", lecun(None, "channels_in", "channels"), (2 * self.stride, width, self.channels))
        left = -(-self.stride // 2)
        x = jnp.pad(padding.masked(x, length), ((0, 0), (left, self.stride - left), (0, 0))).reshape(
            batch, -1, self.stride * width
        )
        first, second = kernel.reshape(2, -1, self.channels)
        y = _dot(x[:, :-1], first) + _dot(x[:, 1:], second)
        return y + self.param("bias", constant(0.0, "channels"), (self.channels,))[None, None]


class First(nn.Module):
    """The first convolution, from one channel."""

    channels: int

    @nn.compact
    def __call__(self, wave: Array) -> Array:
        """[B T] -> [B T channels]."""
        padded = jnp.pad(wave, ((0, 0), (_TAPS // 2, _TAPS // 2)))
        shifted = jnp.stack([padded[:, i:][:, : wave.shape[1]] for i in range(_TAPS)], -1)
        y = _dot(shifted, self.param("kernel", lecun(None, "channels"), (_TAPS, self.channels)))
        return y + self.param("bias", constant(0.0, "channels"), (self.channels,))[None, None]


class DownBlock(nn.Module):
    """Residual units, and downsampling by ``stride`` to twice the channels."""

    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C], of which ``length`` int32 [B] steps are valid -> [B T/stride 2C]."""
        for i, dilation in enumerate(_DILATIONS):
            x = Residual(dilation, name=f"residual_{i}")(x, length)
        return Down(2 * x.shape[-1], self.stride, name="down")(Snake(name="snake")(x), length)


class Latents(nn.Module):
    """A wave of whole frames to latent vectors."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array, length: Array) -> Array:
        """[B T*stride], of which ``length`` int32 [B] samples are valid -> [B T latent_width]."""
        rates = self.config.encoder_rates
        x = First(self.config.latent_width >> len(rates), name="first")(wave)
        for i, stride in enumerate(rates, start=1):
            x = DownBlock(stride, name=f"block_{i}")(x, length)
            length = length // stride
        return Depthwise(name="depthwise")(x, length)


class Encoder(nn.Module):
    """A wave to frames of codes. Blocks and residual units are numbered as in the checkpoint; the codebooks are the decoder's."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array, length: Array) -> Array:
        """Wave [B N], of which ``length`` int32 [B] samples are valid -> int32 [B T Q], 0 after the frames that these begin."""
        c, (batch, samples) = self.config, wave.shape
        frames = -(-samples // c.samples_per_frame)
        count = -(-length // c.samples_per_frame)
        x = jnp.where(padding.valid(length, samples), wave, 0)
        x = jnp.pad(x, ((0, 0), (0, frames * c.samples_per_frame - samples)))
        x = Latents(c, name="encoder")(x, count * c.samples_per_frame)  # the zeros that fill a frame are valid
        books = []
        for i, stride in enumerate(c.strides):
            book = Codebook(c, name=f"codebook_{i}")
            codes = book.nearest(x.reshape(batch, -1, stride, c.latent_width).mean(2))
            x = x - jnp.repeat(book(codes), stride, axis=1)
            books.append(codes.reshape(batch, frames, -1))
        order = np.argsort(np.concatenate(c.slots))
        codes = jnp.concatenate(books, -1)[:, :, order]
        return jnp.where(padding.valid(count, frames)[:, :, None], codes, 0)


@functools.lru_cache
def codec(config: Config) -> Codec:
    """SNAC as a ``jaxspec.types.Codec``, compiled; equal configs give the same object.

    A row has the codes of all codebooks for each frame [T Q], in the order of ``Config.slots``. ``condition`` is ignored. ``key``
    draws the noise that the blocks add, which depends on the row's key and the frame's index; without it there is none.
    """
    decoder = Decoder(config)

    def decode(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        wave: Any = decoder.apply({"params": params}, codes, length, key)
        return wave

    def encode(params: Params, wave: Array, length: Array) -> Array:
        codes: Any = Encoder(config).apply({"params": params}, wave, length)
        return codes

    rate = config.sample_rate_hz
    encoded = jax.jit(encode) if config.encoder_rates else None
    return Codec(encoded, jax.jit(decode), rate, rate / config.samples_per_frame, config.context_frames)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    key, one = jax.random.key(0), jnp.ones(1, jnp.int32)
    codes = jnp.zeros((1, 1, sum(map(len, config.slots))), jnp.int32)
    params = jax.eval_shape(lambda: Decoder(config).init(key, codes, one, None))["params"]
    if config.encoder_rates:  # the codebooks of the encoder have what those of the decoder have, and more
        params |= jax.eval_shape(lambda: Encoder(config).init(key, jnp.zeros((1, config.samples_per_frame)), one))["params"]
    return nn.meta.unbox(params)
