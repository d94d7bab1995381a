"""Trains the codec of the built-in voice: multi-resolution spectra, mel spectra, and the phone that each code stands for.

The phone loss asks a small head to name, from the quantised codes alone, what is being said, so that the few bits of a code go
to what a listener understands. The head is not part of the codec.
"""

from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import spectrum
from jaxspec.codec.builtin import Config, VoiceCodec, codec
from jaxspec.codec.padding import padded_length
from jaxspec.train.loop import Loss
from jaxspec.train.voice.corpus import Recording, read_shard, write_shard
from jaxspec.types import Array, Params

PHONES = ("pau aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh").split()
PHONES_PER_CODE = 2
STFT_SIZES = (256, 512, 1024)


class PhoneHead(nn.Module):
    """Quantised coordinates [B T n] -> phone logits [B T*PHONES_PER_CODE len(PHONES)]."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """A look at two codes to either side."""
        x = nn.gelu(nn.Conv(192, (3,))(z))
        x = nn.gelu(nn.Conv(192, (3,))(x))
        return nn.Dense(PHONES_PER_CODE * len(PHONES))(x).reshape(z.shape[0], -1, len(PHONES))


def init_params(key: Array, config: Config) -> Params:
    """Random weights: {"codec": ..., "phones": ...}."""
    wave, voice = jnp.zeros((1, 8 * config.samples_per_code)), jnp.zeros(1, jnp.int32)
    codec = jax.jit(VoiceCodec(config).init)(key, wave, voice)["params"]
    phones = PhoneHead().init(key, jnp.zeros((1, 8, len(config.levels))))["params"]
    return {"codec": codec, "phones": phones}


def spectral_loss(ours: Array, theirs: Array, config: Config) -> Array:
    """Mean over resolutions of |log magnitude| distance and spectral convergence, plus the log-mel distance. Waves [B N]."""
    total = jnp.float32(0)
    for size in STFT_SIZES:
        a, b = spectrum.magnitude(ours, size, size // 4), spectrum.magnitude(theirs, size, size // 4)
        total += jnp.abs(jnp.log(a + 1e-3) - jnp.log(b + 1e-3)).mean()
        total += jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-3)
    mels = (spectrum.log_mel(w, config.sample_rate_hz, 1024, 256, config.mel_bins) for w in (ours, theirs))
    a, b = mels
    return total / len(STFT_SIZES) + 2 * jnp.abs(a - b).mean()


def loss(config: Config) -> Loss:
    """The loss of a batch (wave float32 [B N], voice int32 [B], phone int32 [B T*PHONES_PER_CODE])."""

    def value(params: Params, batch: tuple[Array, Array, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        wave, voice, phone = batch
        again, z = VoiceCodec(config).apply({"params": params["codec"]}, wave, voice)
        logits = PhoneHead().apply({"params": params["phones"]}, z)
        spectral = spectral_loss(again, wave, config)
        log_law = jax.nn.log_softmax(logits)
        phones = -jnp.take_along_axis(log_law, phone[..., None], axis=-1).mean()
        right = (logits.argmax(-1) == phone).mean()
        return spectral + 0.3 * phones, {"spectral": spectral, "phones": phones, "phone_accuracy": right}

    return value


def decoder_loss(config: Config, codec_params: Params) -> Loss:
    """The spectral loss of the decoder alone: the codes stay as they are, so that models of them stay right."""

    def value(decoder: Params, batch: tuple[Array, Array, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        wave, voice, _ = batch
        again, _ = VoiceCodec(config).apply({"params": {**codec_params, "decoder": decoder}}, wave, voice)
        spectral = spectral_loss(again, wave, config)
        return spectral, {"spectral": spectral}

    return value


def phone_track(utterance: Recording, step_s: float, count: int) -> np.ndarray:
    """The phone at the middle of each of ``count`` steps of ``step_s`` seconds: indices into ``PHONES``, int32 [count]."""
    ends = np.array([end for _, end in utterance.phones])
    names = np.array([PHONES.index(name) for name, _ in utterance.phones], np.int32)
    middle = (np.arange(count) + 0.5) * step_s
    return names[np.minimum(np.searchsorted(ends, middle), len(names) - 1)]


def batches(corpus: Path, voices: list[str], config: Config, batch: int, crop: int, seed: int) -> Iterator[tuple]:
    """Random crops of ``crop`` codes, for ever; a shard is read once for every 1,000 crops."""
    rng = np.random.default_rng(seed)
    length, step = crop * config.samples_per_code, config.samples_per_code // PHONES_PER_CODE
    while True:
        shards = sorted(corpus.glob("*.npz"))
        utterances = [u for i in rng.choice(len(shards), 2, replace=False) for u in read_shard(shards[i])]
        pool = [
            (u, phone_track(u, step / config.sample_rate_hz, len(u.signal) // step)) for u in utterances if len(u.signal) > length
        ]
        for _ in range(2000 // batch):
            rows = []
            for index in rng.integers(len(pool), size=batch):
                utterance, track = pool[index]
                first = (
                    int(rng.integers((len(utterance.signal) - length) // step)) if len(utterance.signal) > length + step else 0
                )
                piece = utterance.signal[first * step :][:length].astype(np.float32) / 32768
                gain = 10 ** rng.uniform(-0.3, 0.1)
                rows.append((piece * gain, voices.index(utterance.voice), track[first:][: crop * PHONES_PER_CODE]))
            wave, voice, phone = zip(*rows, strict=True)
            yield np.stack(wave), np.array(voice, np.int32), np.stack(phone)


def encode_shards(corpus: Path, out: Path, params: Params, config: Config) -> Iterator[str]:
    """Writes each shard of recordings again with codes in place of samples; yields a line a shard. Shards that exist are kept."""
    out.mkdir(parents=True, exist_ok=True)
    encode, span = codec(config).encode, config.samples_per_code
    for path in sorted(corpus.glob("*.npz")):
        if (out / path.name).exists():
            continue
        utterances = read_shard(path)
        counts = [-(-len(u.signal) // span) for u in utterances]
        order = sorted(range(len(utterances)), key=counts.__getitem__)
        encoded: dict[int, Recording] = {}
        for first in range(0, len(order), 32):
            rows = order[first : first + 32]
            # Padded to a round length, so that few lengths are compiled.
            length = np.array([len(utterances[i].signal) for i in rows], np.int32)
            samples = padded_length(counts[rows[-1]]) * span
            wave = np.stack([np.pad(utterances[i].signal, (0, samples - len(utterances[i].signal))) for i in rows])
            codes = np.asarray(encode(params, wave.astype(np.float32) / 32768, length))
            encoded |= {
                i: utterances[i]._replace(signal=row[: counts[i], 0].astype(np.uint16))
                for i, row in zip(rows, codes, strict=True)
            }
        write_shard(out / path.name, [encoded[i] for i in range(len(utterances))])
        yield f"{path.name}: {len(encoded)} utterances"
