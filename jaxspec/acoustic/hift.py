"""HiFT, the vocoder of CosyVoice 2 and 3: mel spectrograms at 50 Hz to 24 kHz waves (HiFTNet, arXiv 2309.09493).

    mel -> pitch -> sines and noise -> STFT -------+
    mel -> convolution -> [x8, x5, x3: upsampling, + that, residual blocks] -> magnitude and phase -> inverse STFT -> wave

Every convolution has zeros for input beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.acoustic import source
from jaxspec.acoustic.stft import istft, stft
from jaxspec.codec import padding
from jaxspec.codec.layers import constant, lecun
from jaxspec.common.sine import sin_squared
from jaxspec.types import Array, Params

POST_TAPS = 7
F0_TAPS, F0_LAYERS = 3, 4  # after the first
_LIMIT = 0.99
_LOUDEST = 100.0  # magnitude


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the networks; the defaults are those of both checkpoints.

    Attributes:
        causal: CosyVoice 3's, whose layers see the past alone, but for the first; else CosyVoice 2's.
        mel_bins: of the spectrogram.
        width: channels before the first upsampling; each upsampling halves them.
        rates: the upsampling factors.
        up_taps: of the transposed convolutions (CosyVoice 2), or of the convolutions of repeated steps (CosyVoice 3).
        taps: of the residual blocks after an upsampling, whose mean is taken.
        source_taps: of the residual block of the source at each upsampling.
        dilations: in a residual block.
        n_fft: samples under the window of the STFT.
        hop: samples between its frames.
        harmonics: sines of the source.
        f0_width: channels of the predictor of pitch.
        sample_rate_hz: of the wave.
        dtype: of the products in the decoder's convolutions; all else is float32.
    """

    causal: bool = False
    mel_bins: int = 80
    width: int = 512
    rates: tuple[int, ...] = (8, 5, 3)
    up_taps: tuple[int, ...] = (16, 11, 7)
    taps: tuple[int, ...] = (3, 7, 11)
    source_taps: tuple[int, ...] = (7, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    n_fft: int = 16
    hop: int = 4
    harmonics: int = 9
    f0_width: int = 512
    sample_rate_hz: int = 24_000
    dtype: str = "float32"

    @property
    def steps_per_frame(self) -> int:
        """Frames of the STFT for each frame of mel."""
        return math.prod(self.rates)

    @property
    def samples_per_frame(self) -> int:
        """Samples of wave for each frame of mel."""
        return self.hop * self.steps_per_frame

    @property
    def frame_rate_hz(self) -> int:
        """Of the mel spectrogram."""
        return self.sample_rate_hz // self.samples_per_frame

    @property
    def first_sides(self) -> tuple[int, int]:
        """Steps before and after the present one that the decoder's first convolution sees."""
        return (0, 4) if self.causal else (3, 3)

    @property
    def f0_first_sides(self) -> tuple[int, int]:
        """Steps before and after the present one that the first convolution of the predictor of pitch sees."""
        return (0, 3) if self.causal else (1, 1)

    def sides(self, taps: int, dilation: int = 1) -> tuple[int, int]:
        """Steps before and after the present one that any other convolution sees."""
        span = (taps - 1) * dilation
        return (span, 0) if self.causal else (span // 2, span // 2)

    def up_sides(self, index: int) -> tuple[int, int]:
        """Steps before and after the present one that an upsampling sees."""
        taps, rate = self.up_taps[index], self.rates[index]
        if self.causal:
            return -(-(taps - 1) // rate), 0
        side = (taps - rate) // 2
        return (taps - 1 - side) // rate, (rate - 1 + side) // rate

    def down(self, index: int) -> tuple[int, int, tuple[int, int]]:
        """The stride and the taps of the convolution of the source's STFT at an upsampling, and the zeros at its ends."""
        stride = math.prod(self.rates[index + 1 :])
        if stride == 1:
            return 1, 1, (0, 0)
        return stride, 2 * stride, (stride - 1, 0) if self.causal else (stride // 2, stride // 2)


V2, V3 = Config(), Config(causal=True)


class Conv(nn.Module):
    """A convolution, of an image of one row: XLA is up to 1.5 times as fast at that on CPU as at one of a sequence.

    Attributes:
        channels: of the result.
        taps: of the kernel.
        sides: zeros before and after the steps.
        dilation: steps between taps.
        stride: steps between results.
        dtype: of the products; the result is float32.
    """

    channels: int
    taps: int
    sides: tuple[int, int]
    dilation: int = 1
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """float32 [B T C], of which ``length`` int32 [B] steps are valid -> float32 [B T/stride channels]."""
        kernel: Any = self.param("kernel", lecun(None, "channels_in", "channels"), (self.taps, x.shape[-1], self.channels))
        image, row = padding.masked(x, length).astype(self.dtype)[:, None], kernel.astype(self.dtype)[None]
        y = jax.lax.conv_general_dilated(
            image,
            row,
            (1, self.stride),
            ((0, 0), self.sides),
            rhs_dilation=(1, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[:, 0]
        return y.astype(jnp.float32) + self.param("bias", constant(0.0, "channels"), (self.channels,))[None, None]


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, with an alpha for each channel (arXiv 2006.08195)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T C]."""
        alpha = self.param("alpha", constant(1.0, "channels"), (x.shape[-1],))[None, None]
        return x + sin_squared(alpha * x) / (alpha + 1e-9)


class Residual(nn.Module):
    """Twice Snake and a convolution for each dilation, added to what went in. Layers are numbered as in the checkpoint."""

    config: Config
    taps: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """[B T C] -> [B T C]."""
        c = self.config
        for i, dilation in enumerate(c.dilations):
            y = x
            for part, spread in (("1", dilation), ("2", 1)):
                y = Snake(name=f"activations{part}_{i}")(y)
                sides = c.sides(self.taps, spread)
                y = Conv(x.shape[-1], self.taps, sides, spread, dtype=c.dtype, name=f"convs{part}_{i}")(y, length)
            x = x + y
        return x


class F0(nn.Module):
    """The predictor of pitch."""

    config: Config

    @nn.compact
    def __call__(self, mel: Array, length: Array) -> Array:
        """mel float32 [B T mel_bins], of which ``length`` int32 [B] frames are valid -> float32 [B T] in Hz, 0 beyond them."""
        c = self.config
        x = nn.elu(Conv(c.f0_width, 1 + sum(c.f0_first_sides), c.f0_first_sides, name="convs_0")(mel, length))
        for i in range(1, F0_LAYERS + 1):
            x = nn.elu(Conv(c.f0_width, F0_TAPS, c.sides(F0_TAPS), name=f"convs_{i}")(x, length))
        x = Conv(1, 1, (0, 0), name="out")(x, length)
        return jnp.abs(padding.masked(x, length)[:, :, 0])


class Source(nn.Module):
    """The weighted sum of sines and noise."""

    config: Config

    @nn.compact
    def __call__(self, f0: Array, noise: Array | None, phase: Array | None = None) -> Array:
        """f0 float32 [B T] in Hz, noise float32 [B T*samples_per_frame harmonics], phase uint32 [B] -> float32 [B N]."""
        c = self.config
        phase = jnp.zeros(len(f0), jnp.uint32) if phase is None else phase
        tones = source.sines(f0, phase, c.harmonics, c.samples_per_frame, c.sample_rate_hz, held=c.causal)
        length = jnp.full(len(f0), tones.shape[1], jnp.int32)
        return jnp.tanh(Conv(1, 1, (0, 0), name="out")(source.excitation(tones, f0, noise), length)[:, :, 0])


class Decoder(nn.Module):
    """Mel and source to a wave. Layers are numbered as in the checkpoint."""

    config: Config

    @nn.compact
    def __call__(self, mel: Array, length: Array, wave: Array) -> Array:
        """mel float32 [B T mel_bins], length int32 [B], source float32 [B T*samples_per_frame] -> float32, the same shape."""
        c, bins = self.config, self.config.n_fft // 2 + 1
        conv = functools.partial(Conv, dtype=c.dtype)
        steps = length * c.steps_per_frame + 1
        spectrum = stft(wave, length * c.samples_per_frame, c.n_fft, c.hop)
        x = conv(c.width, 1 + sum(c.first_sides), c.first_sides, name="conv_pre")(mel, length)
        for i, rate in enumerate(c.rates):
            channels, sides = x.shape[-1] // 2, c.up_sides(i)
            # A channel for each of the ``rate`` steps that a step becomes.
            x = conv(rate * channels, 1 + sum(sides), sides, name=f"ups_{i}")(nn.leaky_relu(x, 0.1), length)
            x, length = x.reshape(len(x), -1, channels), length * rate
            if i == len(c.rates) - 1:  # the STFT has one frame more, which is reflected
                x, length = jnp.concatenate([x[:, 1:2], x], axis=1), steps
            stride, taps, ends = c.down(i)
            y = conv(channels, taps, ends, stride=stride, name=f"source_downs_{i}")(spectrum, steps)
            x = x + Residual(c, c.source_taps[i], name=f"source_resblocks_{i}")(y, length)
            blocks = [Residual(c, n, name=f"resblocks_{len(c.taps) * i + j}") for j, n in enumerate(c.taps)]
            x = functools.reduce(jnp.add, [block(x, length) for block in blocks]) / len(blocks)
        x = conv(2 * bins, POST_TAPS, c.sides(POST_TAPS), name="conv_post")(nn.leaky_relu(x), steps)
        magnitude = jnp.minimum(jnp.exp(x[:, :, :bins]), _LOUDEST)
        made = istft(magnitude, jnp.sin(x[:, :, bins:]), steps, c.hop)
        return jnp.where(padding.valid((steps - 1) * c.hop, made.shape[1]), jnp.clip(made, -_LIMIT, _LIMIT), 0)


class Vocoder(NamedTuple):
    """Compiled functions of parameters and rows [B] of T frames, of which ``length`` int32 [B] are valid, and N samples.

    Attributes:
        wave: (params, mel float32 [B T mel_bins], length, keys [B] | None) -> float32 [B N] within -.99 .. .99, 0 beyond a row's
            length. The keys, of any kind, draw the source's noise, which depends on the row's key and the frame's index alone;
            without them there is none.
        f0: (params, mel, length) -> float32 [B T], the pitch in Hz, 0 beyond a row's length.
        source: (params, f0, noise float32 [B N harmonics] | None, phase uint32 [B] = 0) -> float32 [B N]. ``f0`` is 0 beyond a
            row's length. The phase is that of the fundamental before the first frame, in 2^-32 cycles.
        decode: (params, mel, length, source) -> float32 [B N], the wave.
    """

    wave: Any
    f0: Any
    source: Any
    decode: Any


def _precise(function: Any) -> Any:
    """Compiled, with products in all digits of float32: the exponential of the magnitude amplifies small errors."""

    @jax.jit
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapped


@functools.lru_cache
def vocoder(config: Config) -> Vocoder:
    """The compiled functions of a config; equal configs give the same object."""

    @_precise
    def f0(params: Params, mel: Array, length: Array) -> Any:
        return F0(config).apply({"params": params["f0"]}, mel, length)

    @_precise
    def from_f0(params: Params, f0: Array, noise: Array | None, phase: Array | None = None) -> Any:
        return Source(config).apply({"params": params["source"]}, f0, noise, phase)

    @_precise
    def decode(params: Params, mel: Array, length: Array, wave: Array) -> Any:
        return Decoder(config).apply({"params": params["decoder"]}, mel, length, wave)

    @_precise
    def wave(params: Params, mel: Array, length: Array, key: Array | None) -> Any:
        drawn = None if key is None else noise(config, key, jnp.zeros_like(length), mel.shape[1])
        return decode(params, mel, length, from_f0(params, f0(params, mel, length), drawn))

    return Vocoder(wave, f0, from_f0, decode)


def noise(config: Config, keys: Array, first: Array, frames: int) -> Array:
    """The noise of ``frames`` frames from ``first`` int32 [B] on: float32 [B frames*samples_per_frame harmonics]."""
    return source.noise(keys, first, frames, config.samples_per_frame, config.harmonics, uniform=config.causal)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    key, one = jax.random.key(0), jnp.ones(1, jnp.int32)
    mel, wave = jnp.zeros((1, 1, config.mel_bins)), jnp.zeros((1, config.samples_per_frame))
    made = {
        "f0": lambda: F0(config).init(key, mel, one),
        "source": lambda: Source(config).init(key, mel[:, :, 0], None),
        "decoder": lambda: Decoder(config).init(key, mel, one, wave),
    }
    return {name: nn.meta.unbox(jax.eval_shape(init))["params"] for name, init in made.items()}
