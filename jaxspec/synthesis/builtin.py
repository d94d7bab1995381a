"""The voice that comes with the package, as a synthesizer."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxspec.codec.builtin import codec
from jaxspec.codec.padding import decode_rows
from jaxspec.draft import model_draft
from jaxspec.groups import Groups, acoustic_similarity_groups
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
from jaxspec.models.builtin import MAX_CODES, MAX_SYMBOLS, STOP, VOICES, Voice
from jaxspec.sampling import Sampling
from jaxspec.synthesis.contract import Requests, Settings, Synthesizer
from jaxspec.text import symbols

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
THRESHOLD = 0.85


@functools.lru_cache
def builtin() -> Synthesizer:
    """The voice that comes with the package, its weights on the device."""
    return synthesizer(voices.load())


def synthesizer(voice: Voice) -> Synthesizer:
    """Any voice of its kind."""
    target_params, draft_params, codec_params = jax.device_put((voice.target_params, voice.draft_params, voice.codec_params))

    def decode(rows: Sequence[np.ndarray], settings: Settings) -> list[np.ndarray]:
        """Decodes a batch of rows, all in the voice of the settings."""
        condition = np.full(len(rows), voices.voice_index(settings.voice or VOICES[0]), np.int32)
        return decode_rows(codec(voice.codec), codec_params, rows, condition)

    return Synthesizer(
        target=transformer.language_model(voice.target),
        target_params=target_params,
        drafter=functools.partial(model_draft, transformer.language_model(voice.draft)),
        draft_params=draft_params,
        threshold=THRESHOLD,
        max_batch=16,
        sample_rate_hz=voice.codec.sample_rate_hz,
        pieces=lambda one: symbols.sentences(one, MAX_SYMBOLS),
        requests=_requests,
        groups=functools.partial(_groups, voice),
        codes=_codes,
        decode=decode,
    )


def _requests(sentences: Sequence[str], settings: Settings) -> Requests:
    """The prompts of normalised sentences; a code lasts 40 ms, and no symbol is spoken for longer than four."""
    if settings.reference is not None:
        raise ValueError("expected no reference for the built-in voice, got one: choose --voice slt or rms instead")
    prompts, length = voices.prompts(sentences, [settings.voice or VOICES[0]] * len(sentences))
    limit = np.minimum(min(MAX_CODES, settings.max_codes or MAX_CODES), 16 + 4 * length)
    return Requests(prompts, length, MAX_CODES, limit, (STOP,), [settings.sampling(SAMPLING)] * len(sentences))


def _groups(voice: Voice, threshold: float, matrix: str) -> Groups:
    """The groups of the codes that sound alike; codes that training never met, and the stop id, are alone."""
    vectors, trained = voice.code_vectors(matrix), np.asarray(voice.trained, bool)
    return acoustic_similarity_groups(vectors, threshold, num_codes=STOP, trained=trained)


def _codes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.flatnonzero(ids < STOP)
    return ids[at], at
