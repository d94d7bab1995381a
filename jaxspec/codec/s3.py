"""The S3 speech tokenizers v2 and v3 of CosyVoice 2 and 3 (arXiv 2412.10117, 2505.17589): log-mel frames to 25 codes a second.

    log-mel, 100 frames a second -> two convolutions of stride 2 -> transformer with memory -> 8 digits of 3 levels -> code

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
import numpy as np

from jaxspec.codec import fsq, padding
from jaxspec.codec.layers import constant, layer_norm, lecun, linear
from jaxspec.types import Array, Params

SAMPLE_RATE_HZ, FRAME_RATE_HZ, CODE_RATE_HZ = 16_000, 100, 25
LEVELS = (3,) * 8
_TAPS = 31  # of the memory
_BOUND = 0.9990000128746033  # of a coordinate


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a tokenizer; the defaults are v2's, and v3 has 12 layers.

    norm_eps: of the norms before attention and before the MLP.
    """

    mel_bins: int = 128
    width: int = 1280
    layers: int = 6
    heads: int = 20
    mlp_width: int = 5120
    norm_eps: tuple[float, float] = (1e-5, 1e-5)


def num_codes(frames: Any) -> Any:
    """The number of codes of so many log-mel frames, an integer or an array of them.

    >>> [num_codes(frames) for frames in (0, 1, 4, 5, 3000)]
    [0, 1, 1, 2, 750]
    """
    return (frames + 3) // 4


def _half(features: int, into: str, *, name: str) -> Callable[[Array], Array]:
    """A convolution that halves the number of frames, rounded up."""
    init, zeros = lecun("taps", into, "embed"), constant(0, "embed")
    return nn.Conv(features, (3,), 2, 1, kernel_init=init, bias_init=zeros, name=name)


def _rotated(x: Array) -> Array:
    """[B N H D] with each pair of features (d, d + D/2) rotated by an angle that grows with the position."""
    half = x.shape[-1] // 2
    rates = 1 / np.float32(10_000) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Memory(nn.Module):
    """x plus 31 taps for each channel by itself, as a sum of shifted products: XLA is slow at grouped convolutions on CPU."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B N D], mask bool [B N 1] -> [B N D]."""
        kernel = self.param("kernel", lecun("taps", "heads"), (_TAPS, x.shape[-1]))
        x = jnp.where(mask, x, 0)
        padded = jnp.pad(x, ((0, 0), (_TAPS // 2, _TAPS // 2), (0, 0)))
        return x + sum(padded[:, i:][:, : x.shape[1]] * kernel[i][None, None] for i in range(_TAPS))


class Attention(nn.Module):
    """Attention of every frame to every valid frame, with rotary positions, plus a memory of the values near it."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B N D], mask bool [B N 1] -> [B N D]."""
        c = self.config
        q, k, v = (
            linear(c.width, "embed", "heads", bias=name != "key", name=name)(x).reshape(*x.shape[:2], c.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", _rotated(q), _rotated(k)) / math.sqrt(q.shape[-1])
        weights = nn.softmax(jnp.where(mask[:, None, None, :, 0], scores, jnp.finfo(scores.dtype).min))
        out = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        return linear(c.width, "heads", "embed", name="out")(out) + Memory(name="memory")(v.reshape(x.shape), mask)


class Layer(nn.Module):
    """Attention and MLP, each on a normalised branch of the residual stream."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B N D], mask bool [B N 1] -> [B N D]."""
        c = self.config
        x = x + Attention(c, name="attention")(layer_norm(c.norm_eps[0], name="attention_norm")(x), mask)
        y = linear(c.mlp_width, "embed", "mlp", name="up")(layer_norm(c.norm_eps[1], name="mlp_norm")(x))
        return x + linear(c.width, "mlp", "embed", name="down")(nn.gelu(y, approximate=False))


class Encoder(nn.Module):
    """Log-mel frames to the coordinates that are rounded."""

    config: Config

    @nn.compact
    def __call__(self, log_mel: Array, length: Array) -> Array:
        """log_mel [B T mel_bins], of which ``length`` int32 [B] frames are valid -> [B N 8] in -1 .. 1, N = num_codes(T)."""
        c, x = self.config, log_mel
        for i, into in enumerate(("mel", "embed")):
            x = jnp.where(padding.valid(length, x.shape[1])[:, :, None], x, 0)
            x = nn.gelu(_half(c.width, into, name=f"conv_{i}")(x), approximate=False)
            length = (length + 1) // 2
        mask = padding.valid(length, x.shape[1])[:, :, None]
        for i in range(c.layers):
            x = Layer(c, name=f"layer_{i}")(x, mask)
        return jnp.tanh(linear(len(LEVELS), "embed", "digits", name="project_in")(x)) * np.float32(_BOUND)


@functools.lru_cache
def tokenizer(config: Config) -> Callable[[Params, Array, Array], Array]:
    """The tokenizer, compiled; equal configs give the same object.

    (params, log_mel float32 [B T mel_bins], length int32 [B]) -> codes int32 [B num_codes(T)]

    ``log_mel`` is that of Whisper, of 16 kHz audio: 128 mels, its maximum taken over the whole row, and no padding to 30 s.
    ``length`` counts the valid frames of each row, of which ``num_codes(length)`` codes are made; codes after them are 0.
    CosyVoice refuses rows of more than 30 s.
    """
    model = Encoder(config)

    def tokenize(params: Params, log_mel: Array, length: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            coordinates: Any = model.apply({"params": params}, log_mel, length)
        digits = jnp.round(coordinates).astype(jnp.int32) + 1
        codes = fsq.to_codes(digits, LEVELS)
        return jnp.where(padding.valid(num_codes(length), codes.shape[1]), codes, 0)

    return jax.jit(tokenize)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    frames = jnp.zeros((1, 4, config.mel_bins)), jnp.ones(1, jnp.int32)
    return nn.meta.unbox(jax.eval_shape(lambda: Encoder(config).init(jax.random.key(0), *frames))["params"])
