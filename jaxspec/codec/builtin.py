"""The codec of the built-in voice: one code every 40 ms from a log-mel encoder, and an ISTFT decoder conditioned on the voice.

    wave -> log mel (100 Hz) -> convolutions -> 25 Hz -> FSQ -> codes
    codes + voice -> convolutions at 25 Hz -> 100 Hz -> magnitude and phase -> wave          (the head of Vocos, arXiv 2306.00814)

The decoder is given the voice, so that the codes need to carry only what is said and how. Every convolution has zeros for input
beyond a row's length, so that padding does not change a row.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.codec import fsq, padding, spectrum
from jaxspec.types import Array, Codec, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the codec. A code spans ``hop * stride`` samples.

    The encoder has the widths ``encoder_width`` at 100 Hz and ``width`` at 25 Hz, where it has ``encoder_blocks`` blocks. The
    decoder has ``decoder_width``, with ``coarse_blocks`` blocks at 25 Hz and ``fine_blocks`` at 100 Hz.
    """

    voices: int
    levels: tuple[int, ...] = (7, 5, 5, 5, 5)
    sample_rate_hz: int = 16_000
    hop: int = 160
    stride: int = 4
    n_fft: int = 640
    mel_bins: int = 80
    encoder_width: int = 128
    width: int = 192
    encoder_blocks: int = 3
    decoder_width: int = 192
    coarse_blocks: int = 3
    fine_blocks: int = 3

    @property
    def samples_per_code(self) -> int:
        """Samples of wave for each code."""
        return self.hop * self.stride

    @property
    def context_frames(self) -> tuple[int, int]:
        """The decoder's receptive field: a step for each convolution, and half a window of the ISTFT.

        >>> Config(voices=2).context_frames
        (6, 6)
        """
        fine = self.fine_blocks + self.n_fft // self.hop // 2
        side = 1 + self.coarse_blocks + -(-fine // self.stride)
        return side, side


class Block(nn.Module):
    """x + out(gelu(conv(norm(x)))): a residual block with a full convolution (grouped ones are slow on CPU)."""

    width: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B T D], mask bool [B T 1] -> [B T D]."""
        y = nn.Conv(2 * self.width, (3,), name="conv")(jnp.where(mask, nn.LayerNorm(name="norm")(x), 0))
        return x + nn.Dense(self.width, name="out")(nn.gelu(y))


class Encoder(nn.Module):
    """Log-mel spectrogram to unquantised coordinates."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array, length: Array) -> Array:
        """wave [B N], of which ``length`` int32 [B] samples are valid -> [B N/samples_per_code len(levels)]."""
        c = self.config
        codes = -(-length // c.samples_per_code)
        wave = jnp.where(padding.valid(length, wave.shape[1]), wave, 0)
        x = spectrum.log_mel(wave, c.sample_rate_hz, c.n_fft, c.hop, c.mel_bins) / 4 + 1
        mask = padding.valid(codes * c.stride, x.shape[1])[:, :, None]
        x = Block(c.encoder_width)(nn.Conv(c.encoder_width, (3,))(jnp.where(mask, x, 0)), mask)
        x = nn.Conv(c.width, (2 * c.stride,), strides=(c.stride,))(jnp.where(mask, x, 0))
        mask = padding.valid(codes, x.shape[1])[:, :, None]
        for _ in range(c.encoder_blocks):
            x = Block(c.width)(x, mask)
        return nn.Dense(len(c.levels))(nn.LayerNorm()(x))


class Decoder(nn.Module):
    """Quantised coordinates and a voice to a wave."""

    config: Config

    @nn.compact
    def __call__(self, z: Array, length: Array, voice: Array) -> Array:
        """z [B T len(levels)], of which ``length`` int32 [B] steps are valid, voice int32 [B] -> [B T*samples_per_code]."""
        c = self.config
        mask = padding.valid(length, z.shape[1])[:, :, None]
        x = nn.Conv(c.decoder_width, (3,))(jnp.where(mask, z, 0)) + nn.Embed(c.voices, c.decoder_width)(voice)[:, None]
        for _ in range(c.coarse_blocks):
            x = Block(c.decoder_width)(x, mask)
        x = nn.Dense(c.decoder_width * c.stride)(x).reshape(x.shape[0], -1, c.decoder_width)
        mask = padding.valid(length * c.stride, x.shape[1])[:, :, None]
        for _ in range(c.fine_blocks):
            x = Block(c.decoder_width)(x, mask)
        x = nn.Dense(c.n_fft + 2)(nn.LayerNorm()(x))
        log_magnitude, phase = jnp.split(x, 2, axis=-1)
        frames = spectrum.polar(jnp.exp(jnp.minimum(log_magnitude, 5.0)), phase)
        return spectrum.istft(frames, mask[:, :, 0], c.n_fft, c.hop)


class VoiceCodec(nn.Module):
    """Encoder, quantiser and decoder."""

    config: Config

    def setup(self) -> None:
        """Declares the two halves."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, wave: Array, voice: Array) -> tuple[Array, Array]:
        """wave [B N], voice int32 [B] -> (the reconstruction [B N], quantised coordinates [B T n]); for training."""
        length = jnp.full(wave.shape[0], wave.shape[1], jnp.int32)
        z, _ = fsq.quantize(self.encoder(wave, length), self.config.levels)
        return self.decoder(z, length // self.config.samples_per_code, voice), z

    def encode(self, wave: Array, length: Array) -> Array:
        """wave [B N], of which ``length`` int32 [B] samples are valid -> codes int32 [B T 1]."""
        _, digits = fsq.quantize(self.encoder(wave, length), self.config.levels)
        codes = fsq.to_codes(digits, self.config.levels)
        mask = padding.valid(-(-length // self.config.samples_per_code), codes.shape[1])
        return jnp.where(mask, codes, 0)[..., None]

    def decode(self, codes: Array, length: Array, voice: Array) -> Array:
        """codes int32 [B T 1], of which ``length`` int32 [B] are valid, voice int32 [B] -> wave [B N]."""
        return self.decoder(fsq.vectors(codes[..., 0], self.config.levels), length, voice)


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The codec as the pure functions of ``jaxspec.types.Codec``, compiled; equal configs give the same object.

    ``condition`` of its decoder is the voice of each row, int32 [B] in 0 .. config.voices - 1. It draws no noise: ``key`` is
    ignored.
    """
    model = VoiceCodec(config)

    def encode(params: Params, wave: Array, length: Array) -> Array:
        codes: Any = model.apply({"params": params}, wave, length, method="encode")
        return codes

    def decode(params: Params, codes: Array, length: Array, condition: Array, key: Array | None) -> Array:
        wave: Any = model.apply({"params": params}, codes, length, condition, method="decode")
        return wave

    rate = config.sample_rate_hz
    return Codec(jax.jit(encode), jax.jit(decode), rate, rate / config.samples_per_code, config.context_frames)
