"""The STFT of a few samples a frame, of rows of different lengths.

Frame t is centred on sample t hop, so N samples, a multiple of ``hop``, have N/hop + 1 frames; beyond a row's ends the wave is
reflected, wherever in the batch's padding the row ends.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import padding
from jaxspec.codec.spectrum import analysis, hann, overlap_add, polar, product, synthesis
from jaxspec.types import Array


def stft(wave: Array, length: Array, n_fft: int, hop: int) -> Array:
    """The windowed Fourier transform of each frame.

    Args:
        wave: float32 [B N], N a multiple of ``hop`` and larger than ``n_fft``/2.
        length: int32 [B], the samples of each row.
        n_fft: samples under the window, a multiple of ``hop``.
        hop: samples between frames.

    Returns:
        float32 [B N/hop+1 n_fft+2], the real parts and then the imaginary parts; those beyond a row's length/hop + 1 frames are
        of no use.
    """
    frames, side = wave.shape[1] // hop + 1, n_fft // 2

    def reflected(row: Array, end: Array) -> Array:
        tail = jax.lax.dynamic_slice(row, (end - side - 1,), (side,))[::-1]
        padded = jnp.concatenate([row[side:0:-1], row, jnp.zeros(side, row.dtype)])
        return jax.lax.dynamic_update_slice(padded, tail, (end + side,))

    hops = jax.vmap(reflected)(wave, length).reshape(len(wave), -1, hop)
    windows = jnp.concatenate([hops[:, i : i + frames] for i in range(n_fft // hop)], axis=-1)
    return product(windows, analysis(n_fft))


def istft(magnitude: Array, phase: Array, frames: Array, hop: int) -> Array:
    """The inverse of ``stft``: windowed overlap-add, divided by the sum of the squared windows.

    Args:
        magnitude: float32 [B T n_fft/2+1].
        phase: in radians, the same shape.
        frames: int32 [B], how many frames of each row are valid. The others add nothing to the wave nor to the sum of windows.
        hop: samples between frames.

    Returns:
        The wave, float32 [B (T-1)*hop], of no use beyond (frames - 1) hop samples.
    """
    n_fft = 2 * (magnitude.shape[2] - 1)
    windows = product(polar(magnitude, phase), synthesis(n_fft))
    valid = padding.valid(frames, magnitude.shape[1])[:, :, None]
    wave = overlap_add(jnp.where(valid, windows, 0), hop)
    envelope = overlap_add(jnp.where(valid, np.square(hann(n_fft))[None, None], 0), hop)
    inside = slice(n_fft // 2, -(n_fft // 2))
    return wave[:, inside] / jnp.maximum(envelope[:, inside], 1e-11)
