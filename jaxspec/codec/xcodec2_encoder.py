"""The encoder of X-codec2 and of NeuCodec: a 16 kHz wave to 50 vectors a second, which become codes (arXiv 2502.04128).

    wave -> w2v-BERT 2.0 -> convolutions -------------------------------+-> linear -> linear to 8 coordinates
         -> [residual units, strided convolution] x 5 -> convolution ---+

Every part that mixes frames or samples masks those beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.audio import fbank
from jaxspec.codec import padding, w2v_bert
from jaxspec.codec.layers import constant, lecun, linear
from jaxspec.types import Array, Params

RATE_HZ = fbank.RATE_HZ
_DILATIONS = (1, 3, 9)
_COORDINATES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the encoder; the defaults are X-codec2's.

    semantic: of the conformer.
    channels: after the acoustic branch's first convolution; each stride doubles them.
    strides: of the acoustic branch's convolutions.
    acoustic_width: of the acoustic branch's vectors.
    margin: zeros on each side of the wave that the conformer hears. X-codec2 has 160; NeuCodec has none, which costs it a frame.
    """

    semantic: w2v_bert.Config = dataclasses.field(default_factory=w2v_bert.Config)
    channels: int = 48
    strides: tuple[int, ...] = (2, 2, 4, 4, 5)
    acoustic_width: int = 1024
    margin: int = 160

    @property
    def hop(self) -> int:
        """Samples of the wave for each frame."""
        return math.prod(self.strides)


def frames(config: Config, samples: Any) -> Any:
    """How many frames a wave of ``samples`` (an int or an array) has: always zeros follow it, a whole frame of them if need be.

    >>> [frames(Config(), samples) for samples in (0, 319, 320)]
    [1, 1, 2]
    >>> [frames(Config(margin=0), samples) for samples in (319, 320, 640)]
    [0, 1, 2]
    """
    return samples // config.hop + (1 if config.margin else 0)


def _conv(features: int, taps: int, *, dilation: int = 1, stride: int = 1, bias: bool = True, name: str) -> nn.Conv:
    """A convolution that gives a step for each ``stride`` steps."""
    side = -(-stride // 2) if stride > 1 else taps // 2 * dilation
    return nn.Conv(
        features,
        (taps,),
        (stride,),
        [(side, side)],
        kernel_dilation=(dilation,),
        use_bias=bias,
        kernel_init=lecun("taps", "channels_in", "channels"),
        bias_init=constant(0, "channels"),
        name=name,
    )


def _held(x: Array, length: Array) -> Array:
    """[B T C] with each row's last valid step from its ``length`` on."""
    last = jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)
    return jnp.where(padding.valid(length, x.shape[1])[:, :, None], x, last)


@functools.cache
def _low_pass() -> tuple[np.ndarray, np.ndarray]:
    """The even and the odd taps of a sinc of 12 taps that passes a half of the band, under a Kaiser window: float32 [6] each."""
    taps, transition = 12, 0.3
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * transition + 7.95
    kernel = np.kaiser(taps, 0.1102 * (attenuation - 8.7)) * np.sinc((np.arange(taps) - (taps - 1) / 2) / 2)
    even, odd = (kernel / kernel.sum()).astype(np.float32).reshape(-1, 2).T
    return even, odd


class Snake(nn.Module):
    """x + sin(e^alpha x)^2 / e^beta at twice the rate, between low-pass filters (arXiv 2206.04658), so that nothing aliases.

    Beyond its ends a row goes on with its first and its last value, at either rate. The doubled signal is kept as its even and
    its odd steps.
    """

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """x [B T C], of which ``length`` int32 [B] steps are valid -> [B T C]."""
        alpha, beta = (self.param(name, constant(0, "channels"), x.shape[-1:]) for name in ("alpha", "beta"))
        (even_taps, odd_taps), steps = _low_pass(), x.shape[1]

        def snake(y: Array) -> Array:
            return y + jnp.sin(jnp.exp(alpha)[None, None] * y) ** 2 / (jnp.exp(beta)[None, None] + 1e-9)

        padded = jnp.pad(_held(x, length), ((0, 0), (3, 3), (0, 0)), mode="edge")
        even: Any = sum(2 * odd_taps[i] * padded[:, 5 - i : 5 - i + steps] for i in range(6))
        odd: Any = sum(2 * even_taps[i] * padded[:, 6 - i : 6 - i + steps] for i in range(6))
        even, odd = snake(even), _held(snake(odd), length)
        first, last = even[:, :1], odd[:, -1:]
        mask = padding.valid(length, steps)[:, :, None]
        even = jnp.concatenate([first, first, jnp.where(mask, even, odd), last, last, last], axis=1)
        odd = jnp.concatenate([first, first, first, odd, last, last], axis=1)
        # Fused with the sum that follows, XLA would compute a sine for each tap.
        even, odd = jax.lax.optimization_barrier((even, odd))
        return sum(odd_taps[i] * even[:, i : i + steps] + even_taps[i] * odd[:, i : i + steps] for i in range(6))  # pyright: ignore


class Unit(nn.Module):
    """x + conv(snake(conv(snake(x))))."""

    dilation: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """x [B T C], of which ``length`` int32 [B] steps are valid -> [B T C]."""
        y = padding.masked(Snake(name="snake1")(x, length), length)
        y = _conv(x.shape[-1], 7, dilation=self.dilation, name="conv1")(y)
        return x + _conv(x.shape[-1], 1, name="conv2")(Snake(name="snake2")(y, length))


class Acoustic(nn.Module):
    """A wave to vectors of how it sounds."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array, length: Array) -> Array:
        """wave float32 [B T*hop], 0 beyond each row's samples, of which ``length`` int32 [B] frames are valid -> [B T D]."""
        c, rate = self.config, self.config.hop
        x = _conv(c.channels, 7, name="conv1")(wave[:, :, None])
        for i, stride in enumerate(c.strides):
            for j, dilation in enumerate(_DILATIONS):
                x = Unit(dilation, name=f"block_{i}_unit_{j}")(x, rate * length)
            x = padding.masked(Snake(name=f"block_{i}_snake")(x, rate * length), rate * length)
            x = _conv(2 * x.shape[-1], 2 * stride, stride=stride, name=f"block_{i}_conv")(x)
            rate //= stride
        return _conv(c.acoustic_width, 3, name="conv2")(padding.masked(Snake(name="snake1")(x, length), length))


class Adapter(nn.Module):
    """Convolutions over the conformer's hidden states."""

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """x [B T D], of which ``length`` int32 [B] frames are valid -> [B T D]."""
        conv = functools.partial(_conv, x.shape[-1], 3)
        x = nn.relu(conv(bias=False, name="conv1")(padding.masked(x, length)))
        y = nn.relu(conv(name="conv2")(padding.masked(x, length)))
        x = x + conv(name="conv3")(padding.masked(y, length))
        return conv(bias=False, name="conv4")(padding.masked(x, length))


class Encoder(nn.Module):
    """A wave to coordinates, which are not bounded yet."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array, length: Array) -> Array:
        """wave float32 [B N] at 16 kHz, of which ``length`` int32 [B] samples are valid -> [B T 8], T = ``frames`` of N."""
        c, samples = self.config, wave.shape[1]
        blocks = samples // c.hop + 1
        wave = jnp.where(padding.valid(length, samples), wave, 0)
        wave = jnp.pad(wave, ((0, 0), (0, blocks * c.hop - samples)))
        count, total = frames(c, length), frames(c, samples)
        acoustic = Acoustic(c, name="acoustic")(wave, length // c.hop + 1)[:, :total]
        heard = w2v_bert.features(jnp.pad(wave, ((0, 0), (c.margin, c.margin))), count)
        hidden = w2v_bert.Conformer(c.semantic, name="semantic")(heard, count)
        x = jnp.concatenate([Adapter(name="adapter")(hidden, count), acoustic], axis=-1)
        x = linear(x.shape[-1], "quantizer_in", "quantizer", name="fc")(x)
        return linear(_COORDINATES, "quantizer", "digits", name="project_in")(x)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    wave, length = jnp.zeros((1, config.hop)), jnp.full(1, config.hop)
    return nn.meta.unbox(jax.eval_shape(lambda: Encoder(config).init(jax.random.key(0), wave, length))["params"])
