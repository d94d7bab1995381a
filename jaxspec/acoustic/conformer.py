"""CosyVoice 2's encoder: codes to the mean of the mel spectrogram, two frames for each code (arXiv 2412.10117).

    embedded codes -> look-ahead -> layers -> repeated twice, convolution -> layers -> mean

A layer is that of a conformer without its convolution.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.acoustic import layers
from jaxspec.acoustic.noise import BINS
from jaxspec.codec import padding
from jaxspec.codec.layers import layer_norm, linear, repeated
from jaxspec.types import Array

_EPS = 1e-12  # of the norms within a layer


def relative_positions(steps: int, width: int) -> Array:
    """Interleaved sines and cosines of the distances steps - 1 down to -(steps - 1): float32 [2*steps-1 width]."""
    distance = jnp.arange(steps - 1, -steps, -1, dtype=jnp.float32)
    frequencies = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * (-math.log(10_000) / width))
    angles = distance[:, None] * frequencies[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(-1, width)


def by_key(scores: Array) -> Array:
    """Scores by distance to scores by key, [... T 2*T-1] -> [... T T]: row i, column j gets that of distance i - j.

    >>> by_key(jnp.array([[1, 0, -1], [1, 0, -1]])).tolist()
    [[0, -1], [1, 0]]
    """
    steps, distances = scores.shape[-2:]
    flat = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, 1)]).reshape(*scores.shape[:-2], -1)
    shifted = jax.lax.slice_in_dim(flat, steps - 1, steps - 1 + steps * distances, axis=-1)
    return shifted.reshape(scores.shape)[..., :steps]


class Attention(nn.Module):
    """Attention with relative positions (arXiv 1901.02860)."""

    @nn.compact
    def __call__(self, x: Array, positions: Array, limit: Array) -> Array:
        """x [B T D], positions [2T-1 D], limit int32 [B T] -> [B T D]."""
        width = x.shape[-1]
        count = width // layers.HEAD_DIM
        q, k, v = layers.heads(count, True, x)
        p = linear(width, "embed", "heads", bias=False, name="position")(positions).reshape(-1, count, layers.HEAD_DIM)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", None))
        content: Any = self.param("content_bias", zeros, p.shape[1:])
        position: Any = self.param("position_bias", zeros, p.shape[1:])
        distance = by_key(jnp.einsum("bthd,rhd->bhtr", q + position[None, None], p))
        out = layers.attention(q + content[None, None], k, v, limit, distance)
        return linear(width, "heads", "embed", name="out")(out)


class Layer(nn.Module):
    """Attention and an MLP, each on a normalised branch of the residual stream."""

    @nn.compact
    def __call__(self, x: Array, positions: Array, limit: Array) -> tuple[Array, None]:
        """x [B T D], positions [2T-1 D], limit int32 [B T] -> [B T D]."""
        width = x.shape[-1]
        x = x + Attention(name="attention")(layer_norm(_EPS, name="attention_norm")(x), positions, limit)
        y = linear(4 * width, "embed", "mlp", name="up")(layer_norm(_EPS, name="mlp_norm")(x))
        return x + linear(width, "mlp", "embed", name="down")(nn.silu(y)), None


class Embed(nn.Module):
    """sqrt(D) norm(linear(x))."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T D] -> [B T D]."""
        width = x.shape[-1]
        return layer_norm(1e-5, name="norm")(linear(width, None, "embed", name="linear")(x)) * math.sqrt(width)


class Encoder(nn.Module):
    """Embedded codes to the mean; ``counts``: the layers before and after the frames are doubled."""

    counts: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array, length: Array, kept: Array, chunk: Array) -> Array:
        """Encodes rows.

        Args:
            x: the embedded codes [B N D].
            length: int32 [B].
            kept: the codes that become frames, int32 [B]; those from ``kept`` to ``length`` are only looked ahead to.
            chunk: codes that see each other, int32 [].

        Returns:
            [B 2N 80].
        """
        x = Embed(name="embed")(x)
        x = jnp.where(padding.valid(length, x.shape[1])[:, :, None], x, 0)
        x = layers.LookAhead(x.shape[-1], name="look_ahead")(x)
        x = self._layers("layers", self.counts[0], x, layers.limits(kept, x.shape[1], chunk))
        x = layers.conv(x.shape[-1], 5, "embed", "embed", name="up")(jnp.repeat(x, 2, axis=1))
        x = Embed(name="up_embed")(x)
        x = self._layers("up_layers", self.counts[1], x, layers.limits(2 * kept, x.shape[1], 2 * chunk))
        return linear(BINS, "embed", None, name="out")(layer_norm(1e-5, name="norm")(x))

    def _layers(self, name: str, count: int, x: Array, limit: Array) -> Array:
        positions = relative_positions(*x.shape[1:]).astype(x.dtype)
        x, _ = repeated(Layer, count, nn.broadcast, nn.broadcast)(name=name)(x, positions, limit)
        return x
