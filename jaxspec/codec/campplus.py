"""CAM++, the speaker encoder of CosyVoice (arXiv 2303.00332): fbank frames to the embedding of a voice.

    fbank -> 2-D convolutions over mels -> [dense layers with context-aware masks, transit] x 3 -> mean and deviation -> embedding

Batch norms that follow a convolution are folded into it. Every part that mixes frames masks those beyond a row's length, so that
padding does not change a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.codec import padding
from jaxspec.codec.layers import constant, lecun, linear
from jaxspec.types import Array, Params

SAMPLE_RATE_HZ, FRAME_RATE_HZ = 16_000, 100
_DILATIONS = (1, 2, 2)  # of the blocks
_SEGMENT = 100  # steps of 20 ms


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the encoder; the defaults are those of campplus.onnx.

    mel_bins: of the fbank, a multiple of 8.
    head_channels: of the 2-D convolutions.
    width: what the blocks begin with. growth: what each of their layers adds.
    bottleneck: the features from which a layer computes what it adds. context: those of its mask.
    layers: of each block.
    embedding: values.
    pad_segments: divides the sum of the last, partial segment by the 100 steps of a full one, as onnxruntime 1.18 does; torch and
        later versions of onnxruntime divide by its own.
    """

    mel_bins: int = 80
    head_channels: int = 32
    width: int = 128
    growth: int = 32
    bottleneck: int = 128
    context: int = 64
    layers: tuple[int, ...] = (12, 24, 16)
    embedding: int = 192
    pad_segments: bool = False


def _pointwise(features: int, bias: bool = True, *, name: str) -> nn.Dense:
    return linear(features, "channels_in", "channels", bias, name=name)


def _temporal(features: int, taps: int, stride: int = 1, dilation: int = 1, bias: bool = True, *, name: str) -> nn.Conv:
    init, zeros, side = lecun("taps", "channels_in", "channels"), constant(0, "channels"), taps // 2 * dilation
    return nn.Conv(features, (taps,), stride, side, 1, dilation, use_bias=bias, kernel_init=init, bias_init=zeros, name=name)


def _image(features: int, taps: int, stride: int = 1, *, name: str) -> nn.Conv:
    """Over frames and mels [B T M C]; the stride is that of the mels."""
    init, zeros = lecun("taps", "mel_taps", "channels_in", "channels"), constant(0, "channels")
    return nn.Conv(features, (taps, taps), (1, stride), taps // 2, kernel_init=init, bias_init=zeros, name=name)


def _count(steps: Array) -> Array:
    """A divisor for a sum over so many steps: 1 where there are none."""
    return jnp.maximum(steps, 1).astype(jnp.float32)


class Affine(nn.Module):
    """A scale and an offset for each channel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T C] -> [B T C]."""
        scale, bias = (self.param(name, constant(value, "channels"), x.shape[-1:]) for name, value in (("scale", 1), ("bias", 0)))
        return x * scale[None, None] + bias[None, None]


class Residual(nn.Module):
    """relu(conv(relu(conv(x))) + x), by way of a convolution of one tap where the number of mels is halved."""

    stride: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T M C], mask bool [B T 1 1] -> [B T M/stride C]."""
        channels = x.shape[-1]
        y = nn.relu(_image(channels, 3, self.stride, name="conv1")(x))
        y = _image(channels, 3, name="conv2")(jnp.where(mask, y, 0))
        return jnp.where(mask, nn.relu(y + (_image(channels, 1, self.stride, name="shortcut")(x) if self.stride > 1 else x)), 0)


class Head(nn.Module):
    """Fbank frames to features of an eighth of their mels."""

    config: Config

    @nn.compact
    def __call__(self, fbank: Array, mask: Array) -> Array:
        """[B T mel_bins], 0 where the mask bool [B T 1] is false -> [B T head_channels*mel_bins/8], 0 there too."""
        mask, channels = mask[..., None], self.config.head_channels
        x = jnp.where(mask, nn.relu(_image(channels, 3, name="conv1")(fbank[..., None])), 0)
        for i, stride in enumerate((2, 1, 2, 1)):
            x = Residual(stride, name=f"layer{i // 2 + 1}_{i % 2}")(x, mask)
        x = jnp.where(mask, nn.relu(_image(channels, 3, 2, name="conv2")(x)), 0)
        return x.swapaxes(2, 3).reshape(*x.shape[:2], -1)


class Layer(nn.Module):
    """What a dense layer adds: local features, masked by the context of the row and of the segment of 2 s."""

    config: Config
    dilation: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> Array:
        """x [B N C], of which ``length`` int32 [B] steps are valid -> [B N growth]."""
        c, (batch, steps, _) = self.config, x.shape
        x = _pointwise(c.bottleneck, name="linear1")(nn.relu(Affine(name="norm")(x)))
        x = jnp.where(padding.valid(length, steps)[:, :, None], nn.relu(x), 0)
        local = _temporal(c.growth, 3, dilation=self.dilation, bias=False, name="local")(x)
        segments = -(-steps // _SEGMENT)
        sums = jnp.pad(x, ((0, 0), (0, segments * _SEGMENT - steps), (0, 0))).reshape(batch, segments, _SEGMENT, -1).sum(2)
        left = length[:, None] - _SEGMENT * jnp.arange(segments, dtype=length.dtype)[None]
        means = sums / (_SEGMENT if c.pad_segments else _count(jnp.minimum(left, _SEGMENT))[:, :, None])
        context = means + sums.sum(1, keepdims=True) / _count(length)[:, None, None]
        mask = nn.sigmoid(_pointwise(c.growth, name="mask")(nn.relu(_pointwise(c.context, name="context")(context))))
        return local * jnp.repeat(mask, _SEGMENT, 1)[:, :steps]


class SpeakerEncoder(nn.Module):
    """Fbank frames to an embedding. Blocks and layers are numbered as in the checkpoint."""

    config: Config

    @nn.compact
    def __call__(self, fbank: Array, length: Array) -> Array:
        """Fbank [B T mel_bins], of which ``length`` int32 [B] frames are valid -> [B embedding]."""
        c, mask = self.config, padding.valid(length, fbank.shape[1])[:, :, None]
        mean = jnp.where(mask, fbank, 0).sum(1, keepdims=True) / _count(length)[:, None, None]
        x = Head(c, name="head")(jnp.where(mask, fbank - mean, 0), mask)
        x = nn.relu(_temporal(c.width, 5, 2, name="tdnn")(x))
        length = (length + 1) // 2
        for block, (layers, dilation) in enumerate(zip(c.layers, _DILATIONS, strict=True), start=1):
            for layer in range(1, layers + 1):
                x = jnp.concatenate([x, Layer(c, dilation, name=f"block{block}_{layer}")(x, length)], -1)
            last = block == len(c.layers)  # the norm after it is folded
            x = nn.relu(Affine(name=f"transit{block}_norm")(x))
            x = _pointwise(x.shape[-1] // 2, last, name=f"transit{block}")(x)
        mask = padding.valid(length, x.shape[1])[:, :, None]
        x = jnp.where(mask, nn.relu(x), 0)
        mean = x.sum(1) / _count(length)[:, None]
        squares = jnp.where(mask, (x - mean[:, None]) ** 2, 0).sum(1)
        deviation = jnp.sqrt(squares / _count(length - 1)[:, None])
        return _pointwise(c.embedding, name="dense")(jnp.concatenate([mean, deviation], -1))


@functools.lru_cache
def speaker_encoder(config: Config) -> Callable[[Params, Array, Array], Array]:
    """The encoder, compiled; equal configs give the same object.

    (params, fbank float32 [B T mel_bins], length int32 [B]) -> embeddings float32 [B embedding], not normalised

    ``fbank`` is Kaldi's, of 16 kHz audio in -1 .. 1, without dither. ``length`` counts the valid frames of each row, at least 3.
    The mean over a row's frames is subtracted here; to have subtracted it before changes nothing.
    """
    model = SpeakerEncoder(config)

    def embed(params: Params, fbank: Array, length: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            embedding: Any = model.apply({"params": params}, fbank, length)
            return embedding

    return jax.jit(embed)


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    frames = jnp.zeros((1, 4, config.mel_bins)), jnp.full(1, 4, jnp.int32)
    return nn.meta.unbox(jax.eval_shape(lambda: SpeakerEncoder(config).init(jax.random.key(0), *frames))["params"])
