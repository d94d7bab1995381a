"""The fixed noise from which CosyVoice's flow starts: torch.manual_seed(0), torch.randn(1, 80, 15000), without torch."""

import functools

import numpy as np

BINS, FRAMES = 80, 15_000


@functools.lru_cache(1)
def _buffer() -> np.ndarray:
    """Groups of 16 by Box and Muller, 8 radii and 8 angles, each from 24 bits of MT19937: float32 [FRAMES BINS]."""
    generator = np.random.MT19937()
    generator._legacy_seeding(0)  # as torch seeds; the constructor's own seeding is another
    uniform = (generator.random_raw(BINS * FRAMES) & 0xFFFFFF).astype(np.float32).reshape(-1, 2, 8) * np.float32(2**-24)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.ascontiguousarray(normal.reshape(BINS, FRAMES).T)


def fixed(frames: int) -> np.ndarray:
    """The noise of a row's first frames, those of its prompt included.

    Returns:
        float32 [frames 80], 0 from frame 15000 (300 s) on.

    >>> fixed(2)[0, 0].round(4)
    np.float32(-1.1258)
    """
    made = _buffer()[:frames]
    return np.pad(made, ((0, frames - len(made)), (0, 0)))
