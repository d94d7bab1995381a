"""X-codec2 and NeuCodec: 50 codes a second to a 16 or 24 kHz wave (arXiv 2502.04128), and back, with ``xcodec2_encoder``.

    code -> 8 digits of 4 levels -> convolutions -> transformer -> convolutions -> magnitude and phase -> wave

Every part that mixes frames masks those beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.codec import fsq, padding, spectrum, xcodec2_encoder
from jaxspec.codec.layers import MLP, constant, layer_norm, lecun, linear
from jaxspec.types import Array, Codec, Condition, Params

LEVELS = (4,) * 8
EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the decoder; the defaults are X-codec2's. A code spans ``hop`` samples.

    encoder: its shape; None where there is none.
    """

    width: int = 1024
    layers: int = 12
    heads: int = 16
    head_dim: int = 64
    mlp_width: int = 4096
    quantizer_width: int = 2048
    hop: int = 320
    sample_rate_hz: int = 16_000
    encoder: xcodec2_encoder.Config | None = None

    @property
    def n_fft(self) -> int:
        """Samples under one window of the inverse STFT."""
        return 4 * self.hop


def _conv(features: int, taps: int, into: str, out: str, *, name: str) -> nn.Conv:
    return nn.Conv(features, (taps,), kernel_init=lecun("taps", into, out), bias_init=constant(0, out), name=name)


def _group_norm(axis: str, *, name: str) -> nn.GroupNorm:
    ones, zeros = constant(1, axis), constant(0, axis)
    # The fast variance, E[x^2] - E[x]^2, loses digits to cancellation.
    return nn.GroupNorm(32, epsilon=EPS, use_fast_variance=False, scale_init=ones, bias_init=zeros, name=name)


class ResNetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), each norm over the valid frames, in 32 groups of channels."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        y = x
        for i, (into, out) in enumerate((("embed", "mlp"), ("mlp", "embed")), start=1):
            y = nn.silu(_group_norm(into, name=f"norm{i}")(y, mask=jnp.broadcast_to(mask, y.shape)))
            y = _conv(x.shape[-1], 3, into, out, name=f"conv{i}")(jnp.where(mask, y, 0))
        return x + y


class Attention(nn.Module):
    """Attention of every frame to every valid frame.

    No rotary positions: the trained models rotate query and key by the same angle, which depends on the head, not the time.
    """

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        c = self.config
        q, k, v = (
            linear(c.heads * c.head_dim, "embed", "heads", bias=False, name=name)(x).reshape(*x.shape[:2], c.heads, c.head_dim)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(c.head_dim)
        weights = nn.softmax(jnp.where(mask[:, None, None, :, 0], scores, jnp.finfo(scores.dtype).min))
        out = jnp.einsum("bhts,bshd->bthd", weights, v)
        return linear(c.width, "heads", "embed", bias=False, name="out")(out.reshape(*x.shape[:2], -1))


class Layer(nn.Module):
    """Attention and MLP, each on a normalised branch of the residual stream."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        norm = functools.partial(nn.RMSNorm, epsilon=EPS, scale_init=constant(1, "embed"))
        x = x + Attention(self.config, name="attention")(norm(name="attention_norm")(x), mask)
        return x + MLP(self.config.mlp_width, False, name="mlp")(norm(name="mlp_norm")(x))


class Decoder(nn.Module):
    """Codes to a wave."""

    config: Config

    @nn.compact
    def __call__(self, codes: Array, length: Array) -> Array:
        """codes int32 [B T], of which the first ``length`` int32 [B] are valid -> wave float32 [B T*hop], 0 after them."""
        c = self.config
        mask = padding.valid(length, codes.shape[1])[:, :, None]
        # Of 4 levels the lowest is -1 and the third is 0; ``fsq.vectors`` would spread them evenly over -1 .. 1.
        x = fsq.to_digits(codes, LEVELS).astype(jnp.float32) / 2 - 1
        x = linear(c.quantizer_width, "digits", "quantizer", name="project_out")(x)
        x = linear(c.width, "quantizer", "mlp", name="fc")(x)
        x = _conv(c.width, 7, "mlp", "embed", name="embed")(jnp.where(mask, x, 0))
        for i in range(2):
            x = ResNetBlock(name=f"prior_{i}")(x, mask)
        for i in range(c.layers):
            x = Layer(c, name=f"layer_{i}")(x, mask)
        for i in range(2):
            x = ResNetBlock(name=f"post_{i}")(x, mask)
        x = layer_norm(EPS, name="norm")(x)
        log_magnitude, phase = jnp.split(linear(c.n_fft + 2, "embed", "bins", name="head")(x), 2, axis=-1)
        frames = spectrum.polar(jnp.minimum(jnp.exp(log_magnitude), 100.0), phase)
        return spectrum.istft(frames, mask[:, :, 0], c.n_fft, c.hop)


def quantize(coordinates: Array) -> Array:
    """Coordinates float32 [... 8], unbounded, to codes int32 [...].

    The trained models bound them twice before they round: half tanh(z + atanh(1 / (2 half))) - 1/2 with half = 1.5015.
    """
    half = (LEVELS[0] - 1) / 2 * 1.001
    for _ in range(2):
        coordinates = half * jnp.tanh(coordinates + math.atanh(0.5 / half)) - 0.5
    return fsq.to_codes(jnp.round(coordinates).astype(jnp.int32) + LEVELS[0] // 2, LEVELS)


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The codec as a ``jaxspec.types.Codec``, compiled; equal configs give the same object.

    A row has one code [T 1] for each frame of ``hop`` samples. ``condition`` and ``key`` are ignored. Attention and group norms
    span the whole row, so the context is unbounded on both sides. The encoder's parameters are ``params["encoder"]``, the
    decoder's are beside it; without an encoder ``encode`` is None.
    """
    model = Decoder(config)

    def decode(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        # The exponential in the head amplifies small errors, such as those of TF32.
        with jax.default_matmul_precision("highest"):
            wave: Any = model.apply({"params": params}, codes[..., 0], length)
            return wave

    rate, context = config.sample_rate_hz, (None, None)
    if config.encoder is None:
        return Codec(None, jax.jit(decode), rate, rate / config.hop, context)
    encoder, frames = xcodec2_encoder.Encoder(config.encoder), functools.partial(xcodec2_encoder.frames, config.encoder)

    def encode(params: Params, wave: Array, length: Array) -> Array:
        # Coordinates near the border between two codes are rounded.
        with jax.default_matmul_precision("highest"):
            coordinates: Any = encoder.apply({"params": params["encoder"]}, wave, length)
        codes = quantize(coordinates)
        return jnp.where(padding.valid(frames(length), codes.shape[1]), codes, 0)[:, :, None]

    return Codec(jax.jit(encode), jax.jit(decode), rate, rate / config.hop, context, xcodec2_encoder.RATE_HZ, frames)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    one_code = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    decoder = nn.meta.unbox(jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), *one_code))["params"])
    return decoder | ({"encoder": xcodec2_encoder.abstract_params(config.encoder)} if config.encoder else {})
