"""The measures of one row: error rates, similarity and duration against the recordings of its sentences, and naturalness."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluate.naturalness import naturalness
from jaxspec.evaluate.recognize import Recognizer, error_rates, transcribe
from jaxspec.evaluate.similarity import embed, similarity
from jaxspec.models.builtin import VOICES
from jaxspec.text import symbols
from jaxspec.train.voice.corpus import SAMPLE_RATE_HZ, record

Waves = list[np.ndarray]  # float32 [N] each, at SAMPLE_RATE_HZ
Advance = Callable[[str, int], None]  # (what was done, for how many utterances)


class References(NamedTuple):
    """What each row is measured against, and by which recogniser; sentence i is in voice i modulo the number of voices."""

    sentences: Sequence[str]
    recordings: Waves
    speaker_centroids: dict[str, np.ndarray]  # voice -> the mean embedding of its recordings, float32 [256]
    recognizer: Recognizer


def voice_of(index: int) -> str:
    """The voice of sentence ``index``."""
    return VOICES[index % len(VOICES)]


def record_references(sentences: Sequence[str], recognizer: Recognizer, advance: Advance) -> References:
    """Records each sentence with flite and computes the centroid of each voice.

    Args:
        sentences: two or more, so that each voice has one.
        recognizer: what will transcribe the rows.
        advance: called after each recording.

    Raises:
        RuntimeError: flite is missing or fails.
    """
    recordings = []
    for index, sentence in enumerate(sentences):
        recordings.append(record(symbols.normalize(sentence), voice_of(index)).signal / np.float32(32768))
        advance("recordings", 1)
    centroids = {voice: embed(recordings[first :: len(VOICES)], SAMPLE_RATE_HZ).mean(0) for first, voice in enumerate(VOICES)}
    return References(sentences, recordings, centroids, recognizer)


def measure(name: str, waves: Waves, references: References, advance: Advance) -> dict[str, Any]:
    """One row of the table.

    Args:
        name: of the row.
        waves: the sentences in order, once or several times (seed after seed).
        references: what to measure against.
        advance: called after each set of sentences.

    Returns:
        {"row", "wer", "cer", "wer_interval", "cer_interval", "similarity", "similarity_to_others", "duration_ratio"}, and what
        ``naturalness`` returns: rates as fractions, similarities as cosines. Similarities and naturalness are those of the first
        set, absent where no wave lasts half a second.
    """
    count, transcripts = len(references.sentences), []
    for first in range(0, len(waves), count):
        transcripts += transcribe(waves[first : first + count], references.recognizer)
        advance(name, count)
    mean_samples = sum(map(len, waves)) / len(waves)
    return {
        "row": name,
        **error_rates(references.sentences, transcripts)._asdict(),
        **_of_the_sound(waves[:count], references.speaker_centroids),
        "duration_ratio": mean_samples / (sum(map(len, references.recordings)) / count),
    }


def _of_the_sound(waves: Waves, centroids: dict[str, np.ndarray]) -> dict[str, float]:
    """Similarities and naturalness of the waves that are long enough."""
    long = {index: wave for index, wave in enumerate(waves) if len(wave) > SAMPLE_RATE_HZ // 2 and wave.any()}
    return _similarities(long, centroids) | naturalness(list(long.values())) if long else {}


def _similarities(waves: dict[int, np.ndarray], centroids: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean cosine to the centroid of the own voice, and to the most similar of the others, of waves by sentence number."""
    own, others = [], []
    for index, wave in waves.items():
        embedding, voice = embed([wave], SAMPLE_RATE_HZ)[0], voice_of(index)
        own.append(similarity(embedding, centroids[voice]))
        others.append(max(similarity(embedding, centroid) for name, centroid in centroids.items() if name != voice))
    return {"similarity": float(np.mean(own)), "similarity_to_others": float(np.mean(others))}
