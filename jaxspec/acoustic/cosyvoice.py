"""The codec of CosyVoice 2 and 3: a recording to codes and to the decoder's condition, codes to a spectrogram and to 24 kHz.

recording -> S3 tokens, log mel, speaker's embedding -> condition
condition, codes -> flow -> log mel, 50 frames a second -> vocoder -> wave
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.acoustic import flow, hift, noise
from jaxspec.acoustic.stream import context_frames
from jaxspec.audio import fbank, mel
from jaxspec.audio.resample import resample
from jaxspec.codec import campplus, padding, s3
from jaxspec.types import Array, Codec, Condition, Growing, Params

SAMPLE_RATE_HZ = 24_000
FMAX_HZ = {2: 8000.0, 3: 12000.0}  # of the prompt's spectrogram, by version
_SAMPLES_PER_LOG_MEL = s3.SAMPLE_RATE_HZ // s3.FRAME_RATE_HZ


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The shapes of what encodes a recording."""

    tokenizer: s3.Config
    speaker: campplus.Config


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes of the parts.

    fmax_hz: the highest frequency of the prompt's spectrogram.
    encoder: None where the codec only decodes.
    """

    flow: flow.Config
    vocoder: hift.Config
    fmax_hz: float
    encoder: Encoder | None = None


@functools.lru_cache
def codec(config: Config) -> Codec:
    """The parts as a ``jaxspec.types.Codec``; equal configs give the same object.

    ``condition`` is what ``voice_of`` makes: "codes" int32 [B P] and "length" int32 [B], the prompt's codes, "mel" float32
    [B 2P 80], its spectrogram, and "speaker" float32 [B 192]. ``key`` draws the noise of the vocoder's source. The flow attends
    to the whole row, so the context is unbounded. In ``growing`` it sees chunks of 25 codes, counted from the prompt's first, and
    those before them, as CosyVoice streams; unlike there, in the last chunk too.
    """
    return _decoder(config, streaming=False)._replace(
        encode=config.encoder and functools.partial(encode, config.encoder),
        condition=functools.partial(voice_of, config),
        growing=Growing(_decoder(config, streaming=True), functools.partial(_settled, config)),
    )


def _settled(config: Config, frames: int, condition: Condition) -> int:
    """The codes in whole chunks that have been looked ahead from, less those whose samples depend on mel after them."""
    prompt, (_, after) = int(condition["length"][0]), context_frames(config.vocoder)
    whole = (prompt + frames - flow.LOOK_AHEAD) // flow.CHUNK * flow.CHUNK - prompt
    return max(whole - -(-after // flow.FRAMES_PER_CODE), 0)


def _decoder(config: Config, streaming: bool) -> Codec:
    """The codec without its encoder; ``streaming``: the flow sees chunks."""
    mel_of, vocoder = flow.flow(config.flow).mel, hift.vocoder(config.vocoder)

    def spectrogram(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        prompt_length, frames = condition["length"], flow.FRAMES_PER_CODE * codes.shape[1]
        joined = _joined(condition["codes"], prompt_length, codes[..., 0])
        prompt = prompt_length, condition["mel"], condition["speaker"]
        whole = mel_of(params["flow"], joined, prompt_length + length, *prompt, streaming=streaming, finalize=True)
        at = flow.FRAMES_PER_CODE * prompt_length[:, None] + jnp.arange(frames)[None]
        made = jnp.take_along_axis(whole, at[:, :, None], axis=1)
        return jnp.where(padding.valid(flow.FRAMES_PER_CODE * length, frames)[:, :, None], made, 0)

    def sound(params: Params, spectrum: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        return vocoder.wave(params["vocoder"], spectrum, flow.FRAMES_PER_CODE * length, key)

    def decode(params: Params, codes: Array, length: Array, condition: Condition, key: Array | None) -> Array:
        return sound(params, spectrogram(params, codes, length, condition, key), length, condition, key)

    return Codec(
        encode=None,
        decode=jax.jit(decode),
        sample_rate_hz=SAMPLE_RATE_HZ,
        frame_rate_hz=s3.CODE_RATE_HZ,
        context_frames=(None, None),
        encode_rate_hz=s3.SAMPLE_RATE_HZ,
        encoded_frames=lambda samples: s3.num_codes(samples // _SAMPLES_PER_LOG_MEL),
        stages=(("flow", jax.jit(spectrogram)), ("vocoder", jax.jit(sound))),
    )


def _joined(prompt: Array, prompt_length: Array, codes: Array) -> Array:
    """The codes [B N] of each row right after the ``prompt_length`` [B] valid ones of its prompt [B P]: [B P+N]."""
    at = jnp.arange(prompt.shape[1] + codes.shape[1])[None] - prompt_length[:, None]
    after = jnp.take_along_axis(codes, at, axis=1, mode="clip")
    return jnp.where(at < 0, jnp.pad(prompt, ((0, 0), (0, codes.shape[1]))), after)


def encode(config: Encoder, params: Params, wave: Array | np.ndarray, length: Array | np.ndarray) -> Array:
    """The S3 codes of waves.

    Args:
        config: of the encoder.
        params: of all parts.
        wave: float32 [B N] at 16 kHz.
        length: valid samples of each row, int32 [B].

    Returns:
        int32 [B T 1], 0 after each row's codes.
    """
    rows = [mel.whisper(row[:count]) for row, count in zip(np.asarray(wave), np.asarray(length), strict=True)]
    frames = np.zeros(
        (len(rows), 4 * padding.padded_length(s3.num_codes(max(map(len, rows)))), config.tokenizer.mel_bins), np.float32
    )
    for padded, row in zip(frames, rows, strict=True):
        padded[: len(row)] = row
    counts = np.array([len(row) for row in rows], np.int32)
    return s3.tokenizer(config.tokenizer)(params["encoder"]["tokenizer"], *jax.device_put((frames, counts)))[..., None]


def voice_of(config: Config, params: Params, wave: np.ndarray, rate: int) -> tuple[np.ndarray, Condition]:
    """A recording as a prompt: its codes and spectrogram, cut to the same duration, and its speaker.

    Args:
        config: with an encoder.
        params: of all parts.
        wave: float32 [N], mono.
        rate: of the wave in Hz.

    Returns:
        The codes int32 [T], and the condition of one row, see ``codec``.
    """
    assert config.encoder is not None
    low, high = resample(wave, rate, s3.SAMPLE_RATE_HZ), resample(wave, rate, SAMPLE_RATE_HZ)
    codes = np.asarray(encode(config.encoder, params, low[None], np.array([len(low)], np.int32)))[0, :, 0]
    spectrum, bank = mel.prompt(high, config.fmax_hz), fbank.fbank(low)
    count = min(len(spectrum) // flow.FRAMES_PER_CODE, s3.num_codes(len(low) // _SAMPLES_PER_LOG_MEL))
    frames = np.zeros((1, 4 * padding.padded_length(count), bank.shape[1]), np.float32)
    frames[0, : len(bank)] = bank
    embed = campplus.speaker_encoder(config.encoder.speaker)
    speaker = embed(params["encoder"]["speaker"], *jax.device_put((frames, np.array([len(bank)], np.int32))))
    return codes[:count], condition(np.asarray(speaker), codes[:count], spectrum)


def condition(speaker: np.ndarray, codes: np.ndarray | None = None, spectrum: np.ndarray | None = None) -> dict[str, Any]:
    """The condition of one row; without a prompt it has the speaker alone, as a named voice of CosyVoice does.

    Args:
        speaker: the embedding [1 192].
        codes: of the prompt, int [P].
        spectrum: of the prompt, float32 [at least 2P 80].
    """
    count = 0 if codes is None else len(codes)
    cells = padding.padded_length(count) if count else 0
    prompt, frames = np.zeros((1, cells), np.int32), np.zeros((1, flow.FRAMES_PER_CODE * cells, noise.BINS), np.float32)
    if codes is not None and spectrum is not None:
        prompt[0, :count] = codes
        frames[0, : flow.FRAMES_PER_CODE * count] = spectrum[: flow.FRAMES_PER_CODE * count]
    speaker = np.asarray(speaker, np.float32).reshape(1, -1)
    return {"codes": prompt, "length": np.array([count], np.int32), "mel": frames, "speaker": speaker}


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    params = {"flow": flow.abstract_params(config.flow), "vocoder": hift.abstract_params(config.vocoder)}
    if config.encoder is None:
        return params
    tokenizer, speaker = s3.abstract_params(config.encoder.tokenizer), campplus.abstract_params(config.encoder.speaker)
    return {**params, "encoder": {"tokenizer": tokenizer, "speaker": speaker}}
