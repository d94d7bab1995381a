"""The codec of the built-in voice: one code every 40 ms from a log-mel encoder, and an ISTFT decoder that knows who speaks.

    wave -> log mel (100 Hz) -> convolutions -> 25 Hz -> FSQ -> codes
    codes + voice -> convolutions at 25 Hz -> 100 Hz -> magnitude and phase -> wave          (the head of Vocos, arXiv 2306.00814)

The decoder is given the voice, so that a code is left to say what is said and how, not by whom.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec.codec import fsq, spectrum
from jaxspec.types import Array, Codec, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the codec. A code spans ``hop * stride`` samples."""

    voices: int
    levels: tuple[int, ...] = (7, 5, 5, 5, 5)
    sample_rate_hz: int = 16_000
    hop: int = 160
    stride: int = 4
    n_fft: int = 640
    mel_bins: int = 80
    encoder_width: int = 128
    width: int = 192
    coarse_blocks: int = 3
    fine_blocks: int = 3

    @property
    def samples_per_code(self) -> int:
        """Samples of wave that one code stands for."""
        return self.hop * self.stride


class Block(nn.Module):
    """x + up(gelu(conv(norm(x)))): a residual block with a full convolution (grouped ones are slow on CPU)."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B T D] -> [B T D]."""
        y = nn.Conv(2 * self.width, (3,), name="conv")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(self.width, name="out")(nn.gelu(y))


class Encoder(nn.Module):
    """Log-mel spectrum to unquantised coordinates."""

    config: Config

    @nn.compact
    def __call__(self, wave: Array) -> Array:
        """wave [B N] -> [B N/samples_per_code len(levels)]."""
        c = self.config
        x = spectrum.log_mel(wave, c.sample_rate_hz, c.n_fft, c.hop, c.mel_bins) / 4 + 1
        x = Block(c.encoder_width)(nn.Conv(c.encoder_width, (3,))(x))
        x = nn.Conv(c.width, (2 * c.stride,), strides=(c.stride,))(x)
        for _ in range(c.coarse_blocks):
            x = Block(c.width)(x)
        return nn.Dense(len(c.levels))(nn.LayerNorm()(x))


class Decoder(nn.Module):
    """Quantised coordinates and a voice to a wave."""

    config: Config

    @nn.compact
    def __call__(self, z: Array, voice: Array) -> Array:
        """z [B T len(levels)], voice int32 [B] -> wave [B T*samples_per_code]."""
        c = self.config
        x = nn.Conv(c.width, (3,))(z) + nn.Embed(c.voices, c.width)(voice)[:, None]
        for _ in range(c.coarse_blocks):
            x = Block(c.width)(x)
        x = nn.Dense(c.width * c.stride)(x).reshape(x.shape[0], -1, c.width)
        for _ in range(c.fine_blocks):
            x = Block(c.width)(x)
        x = nn.Dense(c.n_fft + 2)(nn.LayerNorm()(x))
        log_magnitude, phase = jnp.split(x, 2, axis=-1)
        polar = jnp.exp(jnp.minimum(log_magnitude, 5.0)) * jnp.exp(1j * phase)
        return spectrum.istft(polar, c.n_fft, c.hop)


class VoiceCodec(nn.Module):
    """Encoder, quantiser and decoder."""

    config: Config

    def setup(self) -> None:
        """Declares the two halves."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, wave: Array, voice: Array) -> tuple[Array, Array]:
        """wave [B N], voice int32 [B] -> (the wave again [B N], quantised coordinates [B T n]); for training."""
        z, _ = fsq.quantize(self.encoder(wave), self.config.levels)
        return self.decoder(z, voice), z

    def encode(self, wave: Array) -> Array:
        """wave [B N] -> codes int32 [B T 1]."""
        _, digits = fsq.quantize(self.encoder(wave), self.config.levels)
        return fsq.to_codes(digits, self.config.levels)[..., None]

    def decode(self, codes: Array, voice: Array) -> Array:
        """codes int32 [B T 1], voice int32 [B] -> wave [B N]."""
        return self.decoder(fsq.vectors(codes[..., 0], self.config.levels), voice)


@functools.lru_cache
def codec(config: Config, voice: int) -> Codec:
    """The codec as the pair of pure functions of ``jaxspec.types``, with the voice that its decoder speaks in.

    The same arguments give the same object, so that nothing is compiled twice.
    """
    model = VoiceCodec(config)

    def encode(params: Params, wave: Array) -> Array:
        return model.apply({"params": params}, wave, method="encode")

    def decode(params: Params, codes: Array) -> Array:
        voices = jnp.full(codes.shape[0], voice, jnp.int32)
        return model.apply({"params": params}, codes, voices, method="decode")

    frame_rate_hz = config.sample_rate_hz // config.samples_per_code
    return Codec(jax.jit(encode), jax.jit(decode), config.sample_rate_hz, frame_rate_hz)
