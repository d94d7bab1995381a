"""The decoder of SNAC, whose codebooks run at different rates (arXiv 2410.14411): frames of codes to waves, as Orpheus needs.

    codes -> vectors, repeated for their strides, summed -> [x8, x8, x4, x2: transposed convolution, noise, residuals] -> wave

Rows are padded on the right, and biases would fill the padding: what a convolution could see of it is set to zero first.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.types import Array, Codec, Params

_TAPS = 7
_DILATIONS = (1, 3, 9)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the decoder; the defaults are those of the 24 kHz checkpoint.

    decoder_rates: by how much each block raises the rate, while it halves the channels.
    strides: how many latent steps a code of each codebook stands for, coarsest first; the first is a frame.
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
        """Samples of wave that one frame of codes stands for."""
        return self.strides[0] * math.prod(self.decoder_rates)

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Where in a frame the codes of each codebook are: in the order in which their sound begins, coarse before fine.

        >>> Config().slots
        ((0,), (1, 4), (2, 3, 5, 6))
        """
        order = sorted((start, book) for book, s in enumerate(self.strides) for start in range(0, self.strides[0], s))
        return tuple(tuple(i for i, (_, of) in enumerate(order) if of == book) for book in range(len(self.strides)))


def _held(x: Array, length: Array) -> Array:
    """[B T C] with zeros from each row's ``length`` on."""
    return jnp.where((jnp.arange(x.shape[1]) < length[:, None])[:, :, None], x, 0)


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
        return x + jnp.sin(alpha * x) ** 2 / (alpha + 1e-9)


class Pointwise(nn.Module):
    """A convolution that sees one step."""

    channels: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T channels]."""
        y = _dot(x, self.param("kernel", _kernel(("channels_in", "channels")), (x.shape[-1], self.channels)))
        return y + self.param("bias", _per_channel(0.0), (self.channels,)) if self.bias else y


class Depthwise(nn.Module):
    """Seven taps for each channel by itself, as a sum of shifted products: XLA is slow at grouped convolutions on CPU."""

    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        kernel = self.param("kernel", _kernel((None, "channels")), (_TAPS, x.shape[-1]))
        side, steps = _TAPS // 2 * self.dilation, x.shape[1]
        padded = jnp.pad(_held(x, length), ((0, 0), (side, side), (0, 0)))
        shifted = (padded[:, i * self.dilation :][:, :steps] * kernel[i] for i in range(_TAPS))
        return sum(shifted) + self.param("bias", _per_channel(0.0), x.shape[-1:])


class Up(nn.Module):
    """A transposed convolution of 2 * stride taps: a product to two strides of samples for each step, and an overlap-add."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T*stride channels]."""
        batch, steps, width = x.shape
        kernel = self.param("kernel", _kernel(("channels_in", None, "channels")), (width, 2 * self.stride, self.channels))
        y = _dot(_held(x, length), kernel.reshape(width, -1)).reshape(batch, steps, 2, self.stride, self.channels)
        y = jnp.pad(y[:, :, 0], ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(y[:, :, 1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        y = y.reshape(batch, -1, self.channels)[:, -(-self.stride // 2) :][:, : steps * self.stride]
        return y + self.param("bias", _per_channel(0.0), (self.channels,))


class Residual(nn.Module):
    """x + pointwise(snake(depthwise(snake(x))))."""

    dilation: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        y = Depthwise(self.dilation, name="depthwise")(Snake(name="snake_in")(x), length)
        return x + Pointwise(x.shape[-1], name="pointwise")(Snake(name="snake_out")(y))


class Block(nn.Module):
    """Raises the rate by ``stride``, adds noise as loud as the signal asks for, then the residuals."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, length: Array, key: Array | None) -> Array:
        """[B T C] -> [B T*stride channels]; ``length`` counts steps before."""
        x = Up(self.channels, self.stride, name="up")(Snake(name="snake")(x), length)
        loudness = Pointwise(self.channels, bias=False, name="noise")(x)
        if key is not None:
            x = x + jax.random.normal(key, (x.shape[1], 1)) * loudness
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
        vectors = self.param("vectors", normal, (c.codebook_size, c.codebook_dim))
        return Pointwise(c.latent_width, name="out")(vectors[codes])


class Head(nn.Module):
    """The last convolution, to one channel: a product to the seven taps, then the sum of their shifts."""

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T]."""
        taps = _dot(_held(x, length), self.param("kernel", _kernel(("channels_in", None)), (x.shape[-1], _TAPS)))
        padded = jnp.pad(taps, ((0, 0), (_TAPS // 2, _TAPS // 2), (0, 0)))
        shifted = (padded[:, i:, i][:, : x.shape[1]] for i in range(_TAPS))
        return sum(shifted) + self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (1,))


class Decoder(nn.Module):
    """Frames of codes to a wave. Blocks and residuals are numbered by their places in the checkpoint's lists."""

    config: Config

    @nn.compact
    def __call__(self, codes: Array, length: Array, key: Array | None) -> Array:
        """codes int32 [B T Q], length int32 [B] -> float32 [B T*samples_per_frame]."""
        c, batch = self.config, codes.shape[0]
        x, length = 0.0, length * c.strides[0]
        for i, (slots, stride) in enumerate(zip(c.slots, c.strides, strict=True)):
            vectors = Codebook(c, name=f"codebook_{i}")(codes[:, :, jnp.array(slots)].reshape(batch, -1))
            x = x + jnp.repeat(vectors, stride, axis=1)
        x = Pointwise(c.decoder_dim, name="pointwise")(Depthwise(name="depthwise")(x, length))
        keys = [None] * len(c.decoder_rates) if key is None else jax.random.split(key, len(c.decoder_rates))
        for i, stride in enumerate(c.decoder_rates):
            x = Block(x.shape[-1] // 2, stride, name=f"block_{i + 2}")(x, length, keys[i])
            length = length * stride
        wave = jnp.tanh(Head(name="head")(Snake(name="snake")(x), length))
        return _held(wave[:, :, None], length)[:, :, 0]


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The decoder as the pure function of ``jaxspec.types``; there is no encoder. The same config gives the same object.

    decode(params, codes int32 [B T 7], length int32 [B] | None, key | None) -> wave float32 [B T*samples_per_frame].
        length: how many frames of each row hold; the samples of the others are 0, and no sample before them knows of them.
        key: for the noise, the same in every row, so that a row sounds alike in any batch; without it there is none.
    """
    decoder = Decoder(config)

    def decode(params: Params, codes: Array, length: Array | None = None, key: Array | None = None) -> Array:
        length = jnp.full(codes.shape[0], codes.shape[1]) if length is None else length
        return decoder.apply({"params": params}, codes, length, key)

    return Codec(None, jax.jit(decode), config.sample_rate_hz, config.sample_rate_hz / config.samples_per_frame)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    codes = jnp.zeros((1, 1, sum(map(len, config.slots))), jnp.int32)
    variables = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), codes, jnp.ones(1, jnp.int32), None))
    return nn.meta.unbox(variables["params"])
