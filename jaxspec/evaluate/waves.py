"""The waves that the measures of sound take: checked, because a model gives a number for anything."""

from collections.abc import Sequence

import numpy as np


def checked(waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Waves as float32.

    Args:
        waves: [N] each.

    Returns:
        float32 [N] each.

    Raises:
        ValueError: a wave has more than one axis, a sample that is not finite, or only zeros.
    """
    waves = [np.asarray(wave, np.float32) for wave in waves]
    for wave in waves:
        if wave.ndim != 1 or not np.isfinite(wave).all() or not wave.any():
            raise ValueError(
                f"expected waves [N] of finite samples that are not all 0, got shape {wave.shape}, NaN, infinity or silence: "
                "leave such waves out"
            )
    return waves
