"""The decoder of X-codec2 and of NeuCodec: 50 codes a second to a 16 or 24 kHz wave (arXiv 2502.04128).

    code -> 8 digits of 4 levels -> convolutions -> transformer -> convolutions -> magnitude and phase -> wave

Every part that mixes frames masks those beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.codec import fsq, padding, spectrum
from jaxspec.types import Array, Codec, Condition, Params

LEVELS = (4,) * 8
EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the decoder; the defaults are X-codec2's. A code spans ``hop`` samples."""

    width: int = 1024
    layers: int = 12
    heads: int = 16
    head_dim: int = 64
    mlp_width: int = 4096
    quantizer_width: int = 2048
    hop: int = 320
    sample_rate_hz: int = 16_000

    @property
    def n_fft(self) -> int:
        """Samples under one window of the inverse STFT."""
        return 4 * self.hop


def _kernel(*axes: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


def _zeros(axis: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.zeros, (axis,))


def _ones(axis: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.ones, (axis,))


def _linear(features: int, into: str, out: str, bias: bool = False, *, name: str) -> nn.Dense:
    return nn.Dense(features, bias, kernel_init=_kernel(into, out), bias_init=_zeros(out), name=name)


def _conv(features: int, taps: int, into: str, out: str, *, name: str) -> nn.Conv:
    return nn.Conv(features, (taps,), kernel_init=_kernel("taps", into, out), bias_init=_zeros(out), name=name)


def _norm(kind: Callable[..., nn.Module], axis: str, *, name: str) -> nn.Module:
    # The fast variance, E[x^2] - E[x]^2, loses digits to cancellation.
    return kind(epsilon=EPS, use_fast_variance=False, scale_init=_ones(axis), bias_init=_zeros(axis), name=name)


class ResNetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), each norm over the valid frames, in 32 groups of channels."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        y = x
        for i, (into, out) in enumerate((("embed", "mlp"), ("mlp", "embed")), start=1):
            y = nn.silu(
                _norm(functools.partial(nn.GroupNorm, 32), into, name=f"norm{i}")(y, mask=jnp.broadcast_to(mask, y.shape))
            )
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
            _linear(c.heads * c.head_dim, "embed", "heads", name=name)(x).reshape(*x.shape[:2], c.heads, c.head_dim)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(c.head_dim)
        weights = nn.softmax(jnp.where(mask[:, None, None, :, 0], scores, jnp.finfo(scores.dtype).min))
        out = jnp.einsum("bhts,bshd->bthd", weights, v)
        return _linear(c.width, "heads", "embed", name="out")(out.reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """down(silu(up(x)))."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B T D] -> [B T D]."""
        y = nn.silu(_linear(self.config.mlp_width, "embed", "mlp", name="up")(x))
        return _linear(self.config.width, "mlp", "embed", name="down")(y)


class Layer(nn.Module):
    """Attention and MLP, each on a normalised branch of the residual stream."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        norm = functools.partial(nn.RMSNorm, epsilon=EPS, scale_init=_ones("embed"))
        x = x + Attention(self.config, name="attention")(norm(name="attention_norm")(x), mask)
        return x + MLP(self.config, name="mlp")(norm(name="mlp_norm")(x))


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
        x = _linear(c.quantizer_width, "digits", "quantizer", bias=True, name="project_out")(x)
        x = _linear(c.width, "quantizer", "mlp", bias=True, name="fc")(x)
        x = _conv(c.width, 7, "mlp", "embed", name="embed")(jnp.where(mask, x, 0))
        for i in range(2):
            x = ResNetBlock(name=f"prior_{i}")(x, mask)
        for i in range(c.layers):
            x = Layer(c, name=f"layer_{i}")(x, mask)
        for i in range(2):
            x = ResNetBlock(name=f"post_{i}")(x, mask)
        x = _norm(nn.LayerNorm, "embed", name="norm")(x)
        log_magnitude, phase = jnp.split(_linear(c.n_fft + 2, "embed", "bins", bias=True, name="head")(x), 2, axis=-1)
        frames = spectrum.polar(jnp.minimum(jnp.exp(log_magnitude), 100.0), phase)
        return spectrum.istft(frames, mask[:, :, 0], c.n_fft, c.hop)


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The decoder as a ``jaxspec.types.Codec`` without an encoder, compiled; equal configs give the same object.

    A row has one code [T 1] for each frame of ``hop`` samples. ``condition`` and ``key`` are ignored. Attention and group norms
    span the whole row, so the context is unbounded on both sides.
    """
    model = Decoder(config)

    def decode(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        # The exponential in the head amplifies small errors, such as those of TF32.
        with jax.default_matmul_precision("highest"):
            wave: Any = model.apply({"params": params}, codes[..., 0], length)
            return wave

    return Codec(None, jax.jit(decode), config.sample_rate_hz, config.sample_rate_hz / config.hop, (None, None))


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    one_code = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    return nn.meta.unbox(jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), *one_code))["params"])
