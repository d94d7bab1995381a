"""Training of the codec of the built-in voice: losses on spectra, and a phone loss.

The phone loss is the cross-entropy of a small head that predicts the phones from the quantised codes, so that the few bits of a
code carry what makes speech intelligible. The head is not part of the codec.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import fsq, spectrum
from jaxspec.codec.builtin import Config, Decoder, Encoder, VoiceCodec, codec
from jaxspec.codec.padding import padded_length
from jaxspec.train.loop import Loss
from jaxspec.train.voice.corpus import Recording, read_shard, write_shard
from jaxspec.types import Array, Params

PHONES: Sequence[str] = (
    "pau aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
).split()
PHONES_PER_CODE = 2
STFT_SIZES = (256, 512, 1024)


class PhoneHead(nn.Module):
    """Quantised coordinates [B T n] -> phone logits [B T*PHONES_PER_CODE len(PHONES)]."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B T n] -> logits; the receptive field is two codes to either side."""
        x = nn.gelu(nn.Conv(192, (3,))(z))
        x = nn.gelu(nn.Conv(192, (3,))(x))
        return nn.Dense(PHONES_PER_CODE * len(PHONES))(x).reshape(z.shape[0], -1, len(PHONES))


def init_params(key: Array, config: Config) -> Params:
    """Random weights: {"codec": those of the codec, "phones": those of ``PhoneHead``}. The key is consumed."""
    wave, voice = jnp.zeros((1, 8 * config.samples_per_code), jnp.float32), jnp.zeros(1, jnp.int32)
    codec = jax.jit(VoiceCodec(config).init)(key, wave, voice)["params"]
    phones = PhoneHead().init(key, jnp.zeros((1, 8, len(config.levels)), jnp.float32))["params"]
    return {"codec": codec, "phones": phones}


def spectral_loss(output: Array, reference: Array, config: Config) -> Array:
    """L1 of log magnitudes and spectral convergence (arXiv 1910.11480), the mean over STFT sizes, plus L1 of log-mel spectra.

    Args:
        output: waves, float32 [B N].
        reference: waves, float32 [B N].
        config: of the codec.

    Returns:
        float32 [].
    """
    total = jnp.float32(0)
    for size in STFT_SIZES:
        a, b = (spectrum.magnitude(wave, size, size // 4) for wave in (output, reference))
        total += jnp.abs(jnp.log(a + 1e-3) - jnp.log(b + 1e-3)).mean()
        total += jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-3)
    a, b = (spectrum.log_mel(wave, config.sample_rate_hz, 1024, 256, config.mel_bins) for wave in (output, reference))
    return total / len(STFT_SIZES) + 2 * jnp.abs(a - b).mean()


def loss(config: Config) -> Loss:
    """The spectral loss plus 0.3 times the phone loss.

    A batch is (wave float32 [B N], voice int32 [B], phones int32 [B T*PHONES_PER_CODE]); params are those of ``init_params``.
    """

    def value(params: Params, batch: tuple[Array, Array, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        wave, voice, phone = batch
        again, z = VoiceCodec(config).apply({"params": params["codec"]}, wave, voice)
        logits: Any = PhoneHead().apply({"params": params["phones"]}, z)
        spectral = spectral_loss(again, wave, config)
        log_probs = jax.nn.log_softmax(logits)
        phones = -jnp.take_along_axis(log_probs, phone[..., None], axis=-1).mean()
        accuracy = (logits.argmax(-1).astype(phone.dtype) == phone).mean()
        return spectral + 0.3 * phones, {"spectral": spectral, "phones": phones, "phone_accuracy": accuracy}

    return value


def decoder_loss(config: Config, encoder: Params) -> Loss:
    """The spectral loss plus 0.3 times the distance that the fixed encoder sees, as a function of the decoder's weights.

    That distance is the mean L1 between the unquantised coordinates of the recording and of its reconstruction: what the codes
    carry stays audible. As the encoder is fixed, models of its codes stay valid.
    """

    def value(decoder: Params, batch: tuple[Array, Array, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        wave, voice, _ = batch
        length = jnp.full(wave.shape[0], wave.shape[1], jnp.int32)
        coordinates: Any = Encoder(config).apply({"params": encoder}, wave, length)
        z, _ = fsq.quantize(coordinates, config.levels)
        again: Any = Decoder(config).apply({"params": decoder}, z, length // config.samples_per_code, voice)
        heard: Any = Encoder(config).apply({"params": encoder}, again, length)
        spectral, distance = spectral_loss(again, wave, config), jnp.abs(heard - coordinates).mean()
        return spectral + 0.3 * distance, {"spectral": spectral, "coordinates": distance}

    return value


def phone_track(recording: Recording, step_s: float, count: int) -> np.ndarray:
    """The phone at the middle of each step.

    Args:
        recording: with phones.
        step_s: the duration of a step in seconds.
        count: steps.

    Returns:
        indices into ``PHONES``, int32 [count].
    """
    ends = np.array([end for _, end in recording.phones])
    names = np.array([PHONES.index(name) for name, _ in recording.phones], np.int32)
    middle = (np.arange(count) + 0.5) * step_s
    return names[np.minimum(np.searchsorted(ends, middle), len(names) - 1)]


def batches(
    corpus: Path, voices: Sequence[str], config: Config, batch: int, crop: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random crops of the recordings, without end.

    Args:
        corpus: the folder of shards, two or more.
        voices: the names of the voices, in the order of their indices.
        config: of the codec.
        batch: crops in a batch.
        crop: the length of a crop in codes.
        seed: of shards, crops and levels.

    Yields:
        (wave float32 [B N], voice int32 [B], phones int32 [B crop*PHONES_PER_CODE]).
    """
    rng = np.random.default_rng(seed)
    step = config.samples_per_code // PHONES_PER_CODE  # samples for each phone
    length = crop * config.samples_per_code
    while True:
        shards = sorted(corpus.glob("*.npz"))
        recordings = [one for i in rng.choice(len(shards), 2, replace=False) for one in read_shard(shards[i])]
        recordings = [one for one in recordings if len(one.signal) > length]
        tracks = [phone_track(one, step / config.sample_rate_hz, len(one.signal) // step) for one in recordings]
        for _ in range(2000 // batch):  # about as many crops as two shards have recordings
            chosen = rng.integers(len(recordings), size=batch)
            crops = [_crop(recordings[i].signal, tracks[i], step, length, rng) for i in chosen]
            wave, phones = zip(*crops, strict=True)
            voice = [voices.index(recordings[i].voice) for i in chosen]
            yield np.stack(wave), np.array(voice, np.int32), np.stack(phones)


def _crop(
    signal: np.ndarray, track: np.ndarray, step: int, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of ``length`` samples at a random level, and its phones."""
    first = int(rng.integers(max(1, (len(signal) - length) // step)))
    gain = 10 ** rng.uniform(-0.3, 0.1)
    wave = signal[first * step :][:length].astype(np.float32) / 32768
    return wave * gain, track[first:][: length // step]


def encode_shards(corpus: Path, out: Path, params: Params, config: Config) -> Iterator[str]:
    """Encodes a corpus: writes each shard with codes in place of samples. Shards that exist are kept.

    Args:
        corpus: the folder of recordings.
        out: the folder of encoded shards; created if it does not exist.
        params: the codec's weights.
        config: of the codec.

    Yields:
        a line of text after each shard.

    Raises:
        ValueError: there is no shard, or one is damaged.
    """
    paths = sorted(corpus.glob("*.npz"))
    if not paths:
        raise ValueError(f"expected shards of recordings in {corpus}, got none: record the corpus first")
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (out / path.name).exists():
            recordings = read_shard(path)
            write_shard(out / path.name, _encode(recordings, params, config))
            yield f"{path.name}: {len(recordings)} recordings"


def _encode(recordings: Sequence[Recording], params: Params, config: Config, batch: int = 32) -> list[Recording]:
    """The recordings with codes as their signals, encoded in batches of similar length."""
    encode, span = codec(config).encode, config.samples_per_code
    assert encode is not None
    order = sorted(range(len(recordings)), key=lambda i: len(recordings[i].signal))
    encoded: dict[int, Recording] = {}
    for first in range(0, len(order), batch):
        rows = [(i, recordings[i].signal) for i in order[first : first + batch]]
        length = np.array([len(signal) for _, signal in rows], np.int32)
        samples = padded_length(-(-int(length.max()) // span)) * span  # a round length, so that few are compiled
        wave = np.stack([np.pad(signal, (0, samples - len(signal))) for _, signal in rows]).astype(np.float32) / 32768
        codes = np.asarray(encode(params, jnp.asarray(wave), jnp.asarray(length)))
        for (i, signal), row in zip(rows, codes, strict=True):
            encoded[i] = recordings[i]._replace(signal=row[: -(-len(signal) // span), 0].astype(np.uint16))
    return [encoded[i] for i in range(len(recordings))]
