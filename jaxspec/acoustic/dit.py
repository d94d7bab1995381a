"""CosyVoice 3's velocity: a diffusion transformer (arXiv 2212.09748, 2505.17589).

    [x prompt mean speaker] -> linear -> + two grouped convolutions -> blocks modulated by the time -> velocity

What a time gives to the blocks is the same for every row and frame, and is computed once for all times.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.acoustic import layers
from jaxspec.acoustic.noise import BINS
from jaxspec.codec.layers import layer_norm, linear, repeated
from jaxspec.types import Array

TIME_WIDTH = 256  # of the sinusoid
GROUPS, _TAPS = 16, 31
_EPS = 1e-6


class Time(nn.Module):
    """The shifts, scales and gates that a time gives to each layer, and the scale and shift of the last norm."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, sinusoid: Array) -> dict[str, Array]:
        """[S 256] -> "layers" [S layers 6*width], and "norm" [S 2*width]."""
        x = nn.silu(linear(self.width, None, "mlp", name="in")(sinusoid))
        x = nn.silu(linear(self.width, "mlp", "embed", name="out")(x))
        each = layers.linears(self.layers, 6 * self.width, None, x, name="layers")
        return {"layers": each, "norm": linear(2 * self.width, "embed", None, name="norm")(x)}


def rotate_first_head(x: Array) -> Array:
    """Rotary positions as the model was trained: interleaved pairs of the first head alone, [B T H 64] -> [B T H 64]."""
    steps, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(steps, dtype=jnp.float32)[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[None].astype(x.dtype), jnp.sin(angles)[None].astype(x.dtype)
    even, odd = x[:, :, 0, ::2], x[:, :, 0, 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(*x.shape[:2], 1, -1)
    return jnp.concatenate([turned, x[:, :, 1:]], axis=2)


class GroupedConv(nn.Module):
    """mish(convolution in groups of channels), over the step and those before it."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T D] -> [B T D]."""
        width = x.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "embed"))
        kernel: Any = self.param("kernel", init, (_TAPS, width // GROUPS, width))
        bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (width,))
        y = jax.lax.conv_general_dilated(
            x, kernel, (1,), ((_TAPS - 1, 0),), dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=GROUPS
        )
        return jax.nn.mish(y + bias[None, None])


class Layer(nn.Module):
    """Attention and an MLP on branches that are normalised, shifted, scaled and gated by the time."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, time: Array, limit: Array) -> tuple[Array, None]:
        """x [B T D], time [6D], limit int32 [B T] -> [B T D]."""
        width = x.shape[-1]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (part[None, None] for part in jnp.split(time, 6))
        q, k, v = layers.heads(self.heads, True, layer_norm(_EPS, affine=False, name="attention_norm")(x) * (1 + scale) + shift)
        y = layers.attention(rotate_first_head(q), rotate_first_head(k), v, limit)
        x = x + gate * linear(width, "heads", "embed", name="out")(y)
        y = layer_norm(_EPS, affine=False, name="mlp_norm")(x) * (1 + mlp_scale) + mlp_shift
        y = nn.gelu(linear(2 * width, "embed", "mlp", name="up")(y), approximate=True)
        return x + mlp_gate * linear(width, "mlp", "embed", name="down")(y), None


class Estimator(nn.Module):
    """The velocity of a state."""

    width: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, x: Array, mean: Array, speaker: Array, prompt: Array, time: Mapping[str, Array], limit: Array) -> Array:
        """The velocity at one time; see ``unet.Estimator``."""
        x = jnp.concatenate([x, prompt, mean, jnp.broadcast_to(speaker[:, None], x.shape)], axis=-1)
        x = linear(self.width, None, "embed", name="in")(x)
        x = x + GroupedConv(name="conv2")(GroupedConv(name="conv1")(x))
        x, _ = repeated(Layer, self.layers, 0, nn.broadcast)(self.heads, name="layers")(x, time["layers"], limit)
        scale, shift = (part[None, None] for part in jnp.split(time["norm"], 2))
        x = layer_norm(_EPS, affine=False, name="norm")(x) * (1 + scale) + shift
        return linear(BINS, "embed", None, name="out")(x)
