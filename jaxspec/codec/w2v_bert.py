"""w2v-BERT 2.0 (arXiv 2312.05187), the conformer (arXiv 2005.08100) whose hidden states X-codec2 and NeuCodec encode.

    wave -> filter banks, each bin normalised, two frames as one -> [half an MLP, attention, causal convolution, half an MLP] x 16

Attention and normalisation mask the frames beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.audio import fbank
from jaxspec.codec import padding
from jaxspec.codec.layers import MLP, layer_norm, lecun, linear, repeated
from jaxspec.types import Array

STACKED = 2  # frames of filter banks in one
_SCALE = 2.0**15  # it was trained on 16-bit samples
_LEFT, _RIGHT = 64, 8  # farther frames are as these
_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the conformer; the defaults are those of facebook/w2v-bert-2.0, of whose 24 layers the codecs read 16."""

    width: int = 1024
    layers: int = 16
    heads: int = 16
    mlp_width: int = 4096
    taps: int = 31


def features(wave: Array, length: Array) -> Array:
    """Filter banks with mean 0 and variance 1 over each row's valid frames, two frames as one.

    Args:
        wave: float32 [B N] in [-1, 1] at 16 kHz, 0 beyond each row's own samples.
        length: int32 [B], how many of the pairs of frames are valid.

    Returns:
        float32 [B fbank.count(N)//2 160], 0 beyond ``length``.
    """
    frames = fbank.fbank(wave, _SCALE)
    mask = padding.valid(STACKED * length, frames.shape[1])[:, :, None]
    count = (STACKED * length).astype(np.float32)[:, None, None]
    mean = jnp.where(mask, frames, 0).sum(1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(mask, frames - mean, 0)
    variance = (centred**2).sum(1, keepdims=True) / jnp.maximum(count - 1, 1)
    normalised = centred / jnp.sqrt(variance + 1e-7)
    pairs = frames.shape[1] // STACKED
    return normalised[:, : STACKED * pairs].reshape(frames.shape[0], pairs, STACKED * fbank.BINS)


class Attention(nn.Module):
    """Attention of every frame to every valid one: i scores j by q_i (k_j + distance[clip(j - i, -64, 8)]) / sqrt(d)."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T] -> [B T D]."""
        c, (batch, steps, _) = self.config, x.shape
        q, k, v = (
            linear(c.width, "embed", "heads", name=name)(x).reshape(batch, steps, c.heads, -1)
            for name in ("query", "key", "value")
        )
        shape = _LEFT + _RIGHT + 1, c.width // c.heads
        distance: Any = self.param("distance", lecun(None, "head_dim"), shape)
        away = np.clip(np.arange(1 - steps, steps), -_LEFT, _RIGHT) + _LEFT
        scores = jnp.einsum("bthd,bshd->bhts", q, k) + _by_key(jnp.einsum("bthd,rd->bhtr", q, distance[away]))
        scores = jnp.where(mask[:, None, None], scores / math.sqrt(shape[1]), jnp.finfo(scores.dtype).min)
        out = jnp.einsum("bhts,bshd->bthd", nn.softmax(scores), v)
        return linear(c.width, "heads", "embed", name="out")(out.reshape(batch, steps, c.width))


def _by_key(scores: Array) -> Array:
    """[B H T 2T-1], of which column T-1+d is of the key d frames later than the query -> [B H T T], a column for each key."""
    batch, heads, steps, count = scores.shape
    # Rows that are one longer, read as if they were not, shift by one from each to the next.
    flat = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(batch, heads, -1)[:, :, steps - 1 :]
    return flat[:, :, : steps * count].reshape(batch, heads, steps, count)[..., :steps]


class Convolution(nn.Module):
    """A gated, causal, depthwise convolution: its output depends on earlier frames only, so it needs no mask."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B T D] -> [B T D]."""
        c, steps = self.config, x.shape[1]
        value, gate = jnp.split(linear(2 * c.width, "embed", "mlp", bias=False, name="up")(x), 2, axis=-1)
        kernel: Any = self.param("taps", lecun(None, "mlp"), (c.taps, c.width))
        padded = jnp.pad(value * nn.sigmoid(gate), ((0, 0), (c.taps - 1, 0), (0, 0)))
        # A sum of shifted products, as XLA is slow at grouped convolutions on CPU; fused with them it would gate for each tap.
        padded = jax.lax.optimization_barrier(padded)
        y: Any = sum(padded[:, i : i + steps] * kernel[i][None, None] for i in range(c.taps))
        y = nn.silu(layer_norm(_EPS, "mlp", name="norm")(y))
        return linear(c.width, "mlp", "embed", bias=False, name="down")(y)


class Layer(nn.Module):
    """A conformer layer, as ``layers.repeated`` takes it."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        """x [B T D], mask bool [B T] -> [B T D]."""
        c = self.config
        x = x + MLP(c.mlp_width, True, name="ffn1")(layer_norm(_EPS, name="ffn1_norm")(x)) / 2
        x = x + Attention(c, name="attention")(layer_norm(_EPS, name="attention_norm")(x), mask)
        x = x + Convolution(c, name="convolution")(layer_norm(_EPS, name="convolution_norm")(x))
        x = x + MLP(c.mlp_width, True, name="ffn2")(layer_norm(_EPS, name="ffn2_norm")(x)) / 2
        return layer_norm(_EPS, name="norm")(x), None


class Conformer(nn.Module):
    """Normalised filter banks to hidden states. The layers' parameters are stacked on a first axis."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """x [B T 160], of which ``length`` int32 [B] frames are valid -> [B T D]."""
        c = self.config
        x = linear(c.width, "bins", "embed", name="project")(layer_norm(_EPS, "bins", name="norm")(x))
        layers = repeated(Layer, c.layers, nn.broadcast)(c, name="layers")
        x, _ = layers(x, padding.valid(length, x.shape[1]))
        return x
