"""The source of a neural source-filter vocoder: sines at the multiples of a pitch, and noise (arXiv 1904.12088).

Phases are unsigned 32-bit fractions of a cycle. Their sums and their multiples wrap around without error, so that the last
second of a long utterance is as exact as the first, which float32 is not: after 30 s of 200 Hz a phase in radians is off by .02.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.keys import threefry_key
from jaxspec.types import Array

_AMPLITUDE = 0.1
_NOISE = 0.003  # of voiced frames; unvoiced frames have _AMPLITUDE / 3
_VOICED_HZ = 10.0
# The flow's noise, its embedding and its affine map of the voice; the predictor of pitch; and nine phases without effect.
_DRAWN_BEFORE = 5_052_961 + 9


def fraction(hz: Array, rate: int) -> Array:
    """The cycles of a frequency in 1 / ``rate`` seconds, without whole ones, in units of 2^-32.

    Args:
        hz: float32 [...], not negative.
        rate: in Hz, an integer below 2^16.

    Returns:
        uint32 [...], rounded down. The frequency counts down to 2^-26 Hz of a rate of 50 Hz, 2^-17 Hz of 24 kHz.

    >>> int(fraction(jnp.float32(75.0), 50)) == 2**31
    True
    """
    spare = rate.bit_length()
    fixed = (jnp.mod(hz, rate) * np.float32(2.0 ** (32 - spare))).astype(jnp.uint32)
    whole, rest = fixed // np.uint32(rate), fixed % np.uint32(rate)
    return (whole << spare) + (rest << spare) // np.uint32(rate)


def sines(f0: Array, phase: Array, harmonics: int, samples: int, rate: int, held: bool) -> Array:
    """sin(2 pi h phase) for the harmonics h = 1, 2, ...

    Args:
        f0: float32 [B T], in Hz.
        phase: uint32 [B], that of the fundamental before the first frame.
        harmonics: how many, with the fundamental.
        samples: of a frame, an even number.
        rate: in Hz, a multiple of ``samples``.
        held: whether the phase stays the same within a frame (CosyVoice 3). Else it is that of the frame at its middle, with
            lines between (CosyVoice 2).

    Returns:
        float32 [B T*samples harmonics].
    """
    order = jnp.arange(1, harmonics + 1, dtype=jnp.uint32)[None, None]
    ends = phase[:, None] + jnp.cumsum(fraction(f0, rate // samples), axis=1, dtype=jnp.uint32)
    ends = (ends[:, :, None] * order)[:, :, None]  # [B T 1 H]
    if held:
        return jnp.repeat(_sine(ends)[:, :, 0], samples, axis=1)
    step = fraction(f0, rate)[:, :, None] * order
    before, after = (jnp.pad(step[:, 1:], ((0, 0), side, (0, 0)))[:, :, None] for side in ((1, 0), (0, 1)))
    place = jnp.arange(samples, dtype=jnp.int32)[None, None, :, None] - samples // 2  # the middle is half a sample before 0
    slope = jnp.where(place < 0, before, after)
    return _sine(ends + slope * place.astype(jnp.uint32) + slope // 2).reshape(len(f0), -1, harmonics)


def _sine(cycles: Array) -> Array:
    signed = jax.lax.bitcast_convert_type(cycles, jnp.int32)
    return jnp.sin(signed.astype(jnp.float32) * np.float32(2 * np.pi * 2.0**-32))


def noise(keys: Array, first: Array, frames: int, samples: int, harmonics: int, uniform: bool) -> Array:
    """Noise whose values for a frame depend on the row's key and the frame's index alone.

    Args:
        keys: PRNG keys [B] of any kind.
        first: int32 [B], the index of each row's first frame.
        frames: how many.
        samples: of a frame.
        harmonics: values for each sample.
        uniform: in [0, 1) as in CosyVoice 3, else standard normal.

    Returns:
        float32 [B frames*samples harmonics].
    """
    draw = jax.random.uniform if uniform else jax.random.normal

    def one(key: Array, frame: Array) -> Array:
        return draw(jax.random.fold_in(key, frame), (samples, harmonics), jnp.float32)

    index = first[:, None] + jnp.arange(frames, dtype=first.dtype)[None]
    drawn = jax.vmap(jax.vmap(one, (None, 0)))(threefry_key(keys), index.astype(jnp.uint32))
    return drawn.reshape(len(first), frames * samples, harmonics)


def published_noise(samples: int, harmonics: int = 9) -> np.ndarray:
    """The first samples of the noise with which CosyVoice 3 was published, on the host.

    It is drawn once, while its program builds its models after a seed of 0, and is not in the file: what that program draws
    before it is skipped.

    Returns:
        float32 [samples harmonics], uniform in [0, 1).
    """
    generator = np.random.MT19937()
    generator._legacy_seeding(0)
    generator.random_raw(_DRAWN_BEFORE, output=False)
    raw = generator.random_raw(samples * harmonics).astype(np.uint32)
    return ((raw & 0xFFFFFF) * np.float32(2.0**-24)).reshape(samples, harmonics)


def excitation(tones: Array, f0: Array, drawn: Array | None) -> Array:
    """Sines of the voiced frames, and noise, a little in those and more in the others.

    Args:
        tones: float32 [B N H], from ``sines``.
        f0: float32 [B T], in Hz; a frame is voiced from 10 Hz on.
        drawn: float32 [B N H], or None for no noise.

    Returns:
        float32 [B N H].
    """
    voiced = jnp.repeat(f0 > _VOICED_HZ, tones.shape[1] // f0.shape[1], axis=1)[:, :, None]
    tones = jnp.where(voiced, _AMPLITUDE * tones, 0)
    return tones if drawn is None else tones + jnp.where(voiced, _NOISE, _AMPLITUDE / 3) * drawn
