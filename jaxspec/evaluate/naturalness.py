"""Naturalness as models predict it: DNSMOS P.835 (arXiv 2110.01763), and Distill-MOS (2502.05356) where it is installed.

The packages bring the weights of both. The models read 16 kHz, and neither was trained to judge synthesis in particular.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from jaxspec.evaluate.waves import checked

PACKAGES = ("speechmos", "onnxruntime")
OPTIONAL = ("distillmos", "xls_r_sqa", "torchaudio")  # Distill-MOS, and what its package imports
SAMPLE_RATE_HZ = 16_000
_WINDOW = int(9.01 * SAMPLE_RATE_HZ)  # of DNSMOS
_PEAK = 0.5  # each wave is scaled to this peak; DNSMOS moves by some hundredths with the level


def has_distill_mos() -> bool:
    """Whether Distill-MOS and what it imports are installed; imports none of them."""
    return all(importlib.util.find_spec(name) for name in OPTIONAL)


def dnsmos(wave: np.ndarray) -> tuple[float, float, float]:
    """DNSMOS P.835 of one wave.

    Args:
        wave: float32 [N], 16 kHz, within -1 .. 1. Waves shorter than the model's window of 9.01 s are repeated to that length; of
            longer ones, windows a second apart are averaged.

    Returns:
        overall quality, signal and background, about 1 .. 5 each.
    """
    try:
        from speechmos import dnsmos
    except ImportError as error:
        raise ImportError(f"expected speechmos to be installed, got {error}: pip install 'jaxspec[eval]'") from error
    # speechmos repeats waves too, but by doubling: up to eight windows of the same sound.
    found: Any = dnsmos.run(np.resize(wave, max(len(wave), _WINDOW)), SAMPLE_RATE_HZ)
    return float(found["ovrl_mos"]), float(found["sig_mos"]), float(found["bak_mos"])


@cache
def _distill_mos() -> Callable[[np.ndarray], float]:
    import torch
    from distillmos import ConvTransformerSQAModel

    with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights are
        model = ConvTransformerSQAModel().eval()

    def predict(wave: np.ndarray) -> float:
        with torch.inference_mode():
            return model(torch.from_numpy(wave)[None]).item()

    return predict


def distill_mos(wave: np.ndarray) -> float:
    """Distill-MOS of one wave.

    Args:
        wave: float32 [N], 16 kHz. Shorter waves than 7.68 s are padded with silence; of longer ones, windows are averaged.

    Returns:
        the predicted mean opinion score, 1 .. 5.
    """
    return _distill_mos()(wave)


def naturalness(waves: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean predictions for some waves.

    Args:
        waves: one or more, float32 [N] each, 16 kHz, at any level.

    Returns:
        {"dnsmos", "dnsmos_signal", "dnsmos_background"}: overall quality, signal and background; and "distill_mos" where that is
        installed.

    Raises:
        ValueError: there are no waves, or one has more than one axis, a sample that is not finite, or only zeros.
        ImportError: speechmos or onnxruntime is not installed.
    """
    if not waves:
        raise ValueError("expected one wave or more, got none: there is nothing to judge")
    scaled = [wave * np.float32(_PEAK / np.abs(wave).max()) for wave in checked(waves)]
    overall, signal, background = np.mean([dnsmos(wave) for wave in scaled], 0).tolist()
    found = {"dnsmos": overall, "dnsmos_signal": signal, "dnsmos_background": background}
    return found | ({"distill_mos": float(np.mean([distill_mos(wave) for wave in scaled]))} if has_distill_mos() else {})
