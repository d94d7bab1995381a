"""Word and character error rates of speech, references and transcripts normalised alike.

Moonshine base-en (arXiv 2410.15608) transcribes; where its package does not exist, or for a second opinion, pocketsphinx does.
"""

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
from typing import Literal, NamedTuple

import numpy as np

from jaxspec.text.normalize import written_out

Recognizer = Literal["moonshine", "pocketsphinx"]
PACKAGES: dict[Recognizer, str] = {"moonshine": "moonshine_cpp", "pocketsphinx": "pocketsphinx"}
_LISTENER = Path(__file__).with_name("listen.py")
_SILENCE_PEAK = 1e-3  # waves below it are not recognised: the recogniser finds words in digital silence
_MIN_SAMPLES = 1600  # the recogniser needs a few frames
_PEAK = 0.5  # each wave is scaled to this peak, because the recogniser's first estimate of the channel depends on the level


class ErrorRates(NamedTuple):
    """Error rates as fractions, each with the bounds of its 95 % confidence interval."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]


def plain(text: str) -> str:
    """A text as normalised words without punctuation.

    Args:
        text: any text.

    Returns:
        lower-case words separated by spaces; '' when nothing in the text can be spoken.

    >>> plain("At 10:30, please!")
    'at ten thirty please'
    """
    words, _ = written_out(text)
    return re.sub(r"[,.?!]", "", words)


def _pcm(wave: np.ndarray) -> bytes:
    """Length in bytes and 16-bit samples at a fixed peak; empty for silence."""
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or not np.isfinite(wave).all():
        raise ValueError(
            f"expected waves [N] of finite samples, got shape {wave.shape} or NaN or infinity: check what synthesised them"
        )
    peak = np.abs(wave).max(initial=0.0)
    if peak < _SILENCE_PEAK:
        return b""
    wave = np.pad(wave, (0, max(0, _MIN_SAMPLES - len(wave))))
    samples = (wave * (_PEAK / peak) * 32767).astype("<i2").tobytes()
    return struct.pack("<I", len(samples)) + samples


def default_recognizer() -> Recognizer:
    """Moonshine, where its package is installed."""
    return "moonshine" if importlib.util.find_spec(PACKAGES["moonshine"]) else "pocketsphinx"


def _recognize(recognizer: Recognizer, pcm: Sequence[bytes]) -> list[str]:
    command = [sys.executable, "-P", str(_LISTENER), recognizer]
    done = subprocess.run(command, input=b"".join(pcm), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(pcm):
        raise RuntimeError(
            f"expected {len(pcm)} transcripts, got {len(lines)}: the recogniser stopped with {done.stderr.decode()[-500:]}"
        )
    return lines


def transcribe(waves: Sequence[np.ndarray], recognizer: Recognizer, processes: int | None = None) -> list[str]:
    """Transcribes each wave.

    Args:
        waves: float32 [N] each, 16 kHz, at any level.
        recognizer: what transcribes.
        processes: number of recogniser processes; by default one for each core.

    Returns:
        the words of each wave, with punctuation if the recogniser writes it; '' where none is recognised.

    Raises:
        ValueError: a wave has more than one axis, or a sample that is not finite.
        ImportError: the recogniser is not installed.
        RuntimeError: a recogniser process failed.
    """
    package = PACKAGES[recognizer]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"expected {package} to be installed, got no such package: pip install 'jaxspec[eval]'")
    pcm = [_pcm(wave) for wave in waves]
    # Waves are dealt to the processes from long to short, so that all finish at about the same time.
    order = sorted((index for index, samples in enumerate(pcm) if samples), key=lambda index: -len(pcm[index]))
    count = max(1, min(processes or os.cpu_count() or 1, len(order)))
    shares = [order[start::count] for start in range(count) if order]
    texts = [""] * len(pcm)

    def listen(share: Sequence[int]) -> list[str]:
        return _recognize(recognizer, [pcm[index] for index in share])

    with ThreadPoolExecutor(count) as pool:
        for share, lines in zip(shares, pool.map(listen, shares), strict=True):
            for index, line in zip(share, lines, strict=True):
                texts[index] = line
    return texts


def error_rates(references: Sequence[str], hypotheses: Sequence[str], draws: int = 1000) -> ErrorRates:
    """Word and character error rates over all sentences, with bootstrap intervals over sentences (fixed seed).

    Args:
        references: the texts, R of them.
        hypotheses: the transcripts, n R of them: the R sentences in order, n times. The bootstrap draws a sentence with all n of
            its transcripts, so that repetitions do not narrow the interval.
        draws: bootstrap samples.

    Returns:
        the rates, and their 95 % intervals.

    Raises:
        ValueError: there are no references, or the hypotheses are not a multiple of them.

    >>> error_rates(["The cat sat at 10:30."], ["the cat sat at ten thirty"]).wer
    0.0
    """
    if not references or not hypotheses or len(hypotheses) % len(references):
        raise ValueError(
            f"expected hypotheses in a multiple of one or more references, got {len(hypotheses)} for {len(references)}: "
            "give each sentence the same number of transcripts"
        )
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
    """Rate and 95 % bootstrap interval of ``counts`` int [n R 2]: errors and units of each hypothesis."""
    counts = counts.reshape(-1, sentences, 2).sum(0)
    chosen = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    errors, units = np.moveaxis(counts[chosen].sum(1), -1, 0)
    low, high = np.quantile(errors / units, [0.025, 0.975])
    errors, units = counts.sum(0)
    return float(errors / units), (float(low), float(high))
