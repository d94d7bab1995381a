"""Word and character error rates of speech by pocketsphinx, the text normalised alike on both sides."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxspec.text.normalize import normalize

_LISTENER = Path(__file__).with_name("listen.py")
_SILENCE = 1e-3  # a wave that stays below this peak is not recognised at all: the recogniser hears words in digital silence
_SHORTEST = 1600  # samples; the recogniser needs a few frames
_PEAK = 0.5  # every wave is brought to this peak, as the recogniser's first estimate of the channel depends on the level


class ErrorRates(NamedTuple):
    """Error rates as fractions, each with the borders of a 95 % interval."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]


def plain(text: str) -> str:
    """Normalised words without punctuation; '' when there is nothing to say."""
    return re.sub(r"[,.?!]", "", normalize(text)) if any(c.isalnum() for c in text) else ""


def _pcm(wave: np.ndarray) -> bytes:
    """The wave as 16-bit samples at one level, after its length in bytes; nothing for silence."""
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or not np.isfinite(wave).all():
        raise ValueError(
            f"expected waves of finite samples [N], but one has shape {wave.shape} or holds NaN: check the synthesis"
        )
    peak = np.abs(wave).max(initial=0.0)
    if peak < _SILENCE:
        return b""
    wave = np.pad(wave, (0, max(0, _SHORTEST - len(wave))))
    samples = (wave * (_PEAK / peak) * 32767).astype("<i2").tobytes()
    return struct.pack("<I", len(samples)) + samples


def _hear(pcm: Sequence[bytes]) -> list[str]:
    command = [sys.executable, "-P", str(_LISTENER)]
    done = subprocess.run(command, input=b"".join(pcm), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(pcm):
        raise RuntimeError(f"the recogniser stopped after {len(lines)} of {len(pcm)} waves: {done.stderr.decode()[-500:]}")
    return lines


def transcribe(waves: Sequence[np.ndarray], processes: int | None = None) -> list[str]:
    """What is said in each wave, in lower-case words; '' where nothing is.

    Args:
        waves: float32 [N] each, at 16 kHz, of any level.
        processes: how many recognisers run side by side, by default one for each core. They are processes of their own.

    Raises:
        ValueError: for a wave that is not one row of finite samples.
        ImportError: when pocketsphinx is not installed.
    """
    if importlib.util.find_spec("pocketsphinx") is None:
        raise ImportError("expected pocketsphinx for word error rates: pip install 'jaxspec[eval]'")
    pcm = [_pcm(wave) for wave in waves]
    # The longest come first and are dealt like cards, so that all recognisers end at about the same time.
    order = sorted((index for index, samples in enumerate(pcm) if samples), key=lambda index: -len(pcm[index]))
    count = max(1, min(processes or os.cpu_count() or 1, len(order)))
    shares = [order[start::count] for start in range(count) if order]
    texts = [""] * len(pcm)
    with ThreadPoolExecutor(count) as pool:
        for share, lines in zip(shares, pool.map(_hear, ([pcm[index] for index in share] for share in shares)), strict=True):
            for index, line in zip(share, lines, strict=True):
                texts[index] = line
    return texts


def error_rates(references: Sequence[str], hypotheses: Sequence[str], draws: int = 1000) -> ErrorRates:
    """Word and character error rates over all sentences, with bootstrap intervals over sentences (fixed seed).

    The hypotheses may be several rounds of the sentences, one after the other; a sentence is drawn with all of its rounds.

    >>> error_rates(["The cat sat at 10:30."], ["the cat sat at ten thirty"]).wer
    0.0

    Raises:
        ValueError: when there are no references, or not one or more whole rounds of hypotheses.
    """
    if not references or not hypotheses or len(hypotheses) % len(references):
        raise ValueError(f"expected a hypothesis a reference, or rounds of them: {len(references)} and {len(hypotheses)} came")
    pairs = [(plain(reference), plain(hypothesis)) for reference, hypothesis in zip(cycle(references), hypotheses, strict=False)]
    wer, wer_interval = _rate(np.array([_word_errors(*pair) for pair in pairs]), len(references), draws)
    cer, cer_interval = _rate(np.array([_character_errors(*pair) for pair in pairs]), len(references), draws)
    return ErrorRates(wer, cer, wer_interval, cer_interval)


def _word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    import jiwer

    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(reference.split())


def _character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    import jiwer

    found = jiwer.process_characters(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(reference)


def _rate(counts: np.ndarray, sentences: int, draws: int) -> tuple[float, tuple[float, float]]:
    """Errors over units of ``counts`` int [N 2], rounds of the sentences, and the 95 % interval when sentences are drawn anew."""
    counts = counts.reshape(-1, sentences, 2).sum(0)
    chosen = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    errors, units = np.moveaxis(counts[chosen].sum(1), -1, 0)
    low, high = np.quantile(errors / units, [0.025, 0.975])
    errors, units = counts.sum(0)
    return float(errors / units), (float(low), float(high))
