"""CosyVoice 2's velocity: a U-Net of one level, whose stages are a residual unit and transformer blocks (arXiv 2412.10117).

    [x mean speaker prompt] -> down -> middle stages -> up, which sees down's output again -> velocity

Positions come from the convolutions, which look back only.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.acoustic import layers
from jaxspec.acoustic.noise import BINS
from jaxspec.codec.layers import layer_norm, linear, repeated
from jaxspec.types import Array

TIME_WIDTH = 4 * BINS  # of the sinusoid
_EPS = 1e-5


class Time(nn.Module):
    """What a time adds to the channels of each stage."""

    width: int
    stages: int

    @nn.compact
    def __call__(self, sinusoid: Array) -> dict[str, Array]:
        """[S 320] -> "down" and "up" [S width], and "middle" [S stages width]."""
        x = nn.silu(linear(4 * self.width, None, "mlp", name="in")(sinusoid))
        x = jax.nn.mish(linear(4 * self.width, "mlp", "embed", name="out")(x))
        ends = {name: linear(self.width, "embed", "embed", name=name)(x) for name in ("down", "up")}
        return {**ends, "middle": layers.linears(self.stages, self.width, "embed", x, name="middle")}


class ConvBlock(nn.Module):
    """mish(norm(conv))."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T width]."""
        return jax.nn.mish(layer_norm(_EPS, name="norm")(layers.conv(self.width, 3, "embed", "embed", name="conv")(x)))


class Block(nn.Module):
    """Attention without positions and an MLP, each on a normalised branch of the residual stream."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, limit: Array) -> Array:
        """x [B T D], limit int32 [B T] -> [B T D]."""
        width = x.shape[-1]
        q, k, v = layers.heads(self.heads, False, layer_norm(_EPS, name="attention_norm")(x))
        x = x + linear(width, "heads", "embed", name="out")(layers.attention(q, k, v, limit))
        y = linear(4 * width, "embed", "mlp", name="up")(layer_norm(_EPS, name="mlp_norm")(x))
        return x + linear(width, "mlp", "embed", name="down")(nn.gelu(y, approximate=False))


class Stage(nn.Module):
    """A residual unit, to which the time is added, and transformer blocks."""

    width: int
    heads: int
    blocks: int

    @nn.compact
    def __call__(self, x: Array, time: Array, limit: Array) -> tuple[Array, None]:
        """x [B T C], time [width], limit int32 [B T] -> [B T width]."""
        y = ConvBlock(self.width, name="conv_in")(x) + time[None, None]
        x = ConvBlock(self.width, name="conv_out")(y) + linear(self.width, "embed", "embed", name="shortcut")(x)
        for i in range(self.blocks):
            x = Block(self.heads, name=f"block_{i}")(x, limit)
        return x, None


class Estimator(nn.Module):
    """The velocity of a state."""

    width: int
    heads: int
    stages: int
    blocks: int

    @nn.compact
    def __call__(self, x: Array, mean: Array, speaker: Array, prompt: Array, time: Mapping[str, Array], limit: Array) -> Array:
        """The velocity at one time.

        Args:
            x: the state [B T 80].
            mean: [B T 80].
            speaker: [B 80].
            prompt: the mel spectrogram where it is known, else 0 [B T 80].
            time: what ``Time`` made of it, without S.
            limit: int32 [B T].

        Returns:
            [B T 80].
        """
        sizes = self.width, self.heads, self.blocks
        x = jnp.concatenate([x, mean, jnp.broadcast_to(speaker[:, None], x.shape), prompt], axis=-1)
        skip, _ = Stage(*sizes, name="down")(x, time["down"], limit)
        x = layers.conv(self.width, 3, "embed", "embed", name="down_conv")(skip)
        x, _ = repeated(Stage, self.stages, 0, nn.broadcast)(*sizes, name="middle")(x, time["middle"], limit)
        x, _ = Stage(*sizes, name="up")(jnp.concatenate([x, skip], axis=-1), time["up"], limit)
        x = layers.conv(self.width, 3, "embed", "embed", name="up_conv")(x)
        return linear(BINS, "embed", None, name="out")(ConvBlock(self.width, name="last")(x))
