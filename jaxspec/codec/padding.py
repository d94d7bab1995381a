"""Rows of codes of different lengths as one padded batch, of which there are few shapes, and masks of what is valid in it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import mesh
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.types import Array, Codec, Condition, Params

_STEP = 40  # frames


def valid(length: Array, count: int) -> Array:
    """Which of ``count`` steps come before each row's ``length`` int32 [B]: bool [B count].

    >>> valid(jnp.array([0, 2]), 3).tolist()
    [[False, False, False], [True, True, False]]
    """
    return jnp.arange(count, dtype=length.dtype)[None] < length[:, None]


def masked(x: Array, length: Array) -> Array:
    """[B T C] with zeros from each row's ``length`` int32 [B] on."""
    return jnp.where(valid(length, x.shape[1])[:, :, None], x, 0)


def padded_length(frames: int) -> int:
    """The length to which a row of ``frames`` is padded: multiples of 40 up to 320, then four to each octave.

    >>> [padded_length(frames) for frames in (0, 40, 41, 320, 321, 1000)]
    [40, 40, 80, 320, 400, 1120]
    """
    step = _STEP
    while 8 * step < frames:
        step *= 2
    return max(-(-frames // step), 1) * step


def padded_batch(rows: int) -> int:
    """The number of rows to which a batch is padded, a power of 2, so that few shapes are compiled.

    >>> [padded_batch(rows) for rows in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (rows - 1).bit_length()


def encode_rows(codec: Codec, params: Params, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encodes waves on the host, in one call; a mesh divides the batch.

    Args:
        codec: the codec.
        params: its parameters.
        waves: float32 [N] each, at the rate that the codec encodes.

    Returns:
        The codes of each wave, int32 [T Q].

    Raises:
        ValueError: the codec has no encoder.
    """
    if codec.encode is None:
        raise ValueError("expected a codec with an encoder, got one that only decodes: convert it again, with its encoder")
    span = round((codec.encode_rate_hz or codec.sample_rate_hz) / codec.frame_rate_hz)
    length = np.array([len(wave) for wave in waves], np.int32)
    batch = mesh.multiple(padded_batch(len(waves)))
    padded = np.zeros((batch, padded_length(-(-int(length.max()) // span)) * span), np.float32)
    for row, wave in zip(padded, waves, strict=False):
        row[: len(wave)] = wave
    codes = mesh.fetch(codec.encode(params, *jax.device_put((padded, np.pad(length, (0, batch - len(waves)))), mesh.rows())))
    frames = codec.encoded_frames or (lambda samples: -(-samples // span))
    return [row[: frames(len(wave))] for row, wave in zip(codes, waves, strict=False)]


def decode_rows(
    codec: Codec,
    params: Params,
    rows: Sequence[np.ndarray],
    condition: Condition = None,
    key: Array | None = None,
    prefix: np.ndarray | None = None,
    watch: Stopwatch | None = None,
) -> list[np.ndarray]:
    """Decodes rows of codes on the host, in one batch, which a mesh divides.

    Args:
        codec: the codec.
        params: its parameters.
        rows: the codes of each row, int32 [T] or, with Q codebooks, [T Q]; T may be 0.
        condition: a tree of arrays with ``len(rows)`` as their leading axis, or None.
        key: PRNG keys [len(rows)], or None.
        prefix: codes [P] or [P Q] that every row continues, such as those of a reference; their part of the wave is cut off.
        watch: to which the seconds of each of the codec's stages are added.

    Returns:
        The wave of each row, float32 [T * samples per frame].
    """
    skip = 0 if prefix is None else len(prefix)
    whole = [np.concatenate([prefix, row]) if prefix is not None and skip else np.asarray(row) for row in rows]
    length = np.array([len(row) for row in whole], np.int32)
    batch = mesh.multiple(padded_batch(len(rows)))
    codes = np.zeros((batch, padded_length(int(length.max())), *whole[0].shape[1:]), np.int32)
    for padded, row in zip(codes, whole, strict=False):
        padded[: len(row)] = row
    codes = codes.reshape(*codes.shape[:2], -1)
    condition, key = jax.tree.map(lambda x: x[np.arange(batch) % len(rows)], (condition, key))
    waves, *arguments = jax.device_put((codes, np.pad(length, (0, batch - len(rows))), condition, key), mesh.rows())
    for name, stage in codec.stages or (("codec", codec.decode),):
        with (watch or Stopwatch())(name):
            waves = jax.block_until_ready(stage(params, waves, *arguments))
    waves = mesh.fetch(waves)
    span = round(codec.sample_rate_hz / codec.frame_rate_hz)
    return [wave[skip * span : count * span] for wave, count in zip(waves, length, strict=False)]
