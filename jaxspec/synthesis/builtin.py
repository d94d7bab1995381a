"""The voice that comes with the package, as a synthesizer."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from jaxspec import groups
from jaxspec.checkpoint import groups as group_files
from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.codec.builtin import codec
from jaxspec.codec.padding import decode_rows
from jaxspec.common import records
from jaxspec.common.compilation_cache import cache_folder, keep
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.common.trees import flatten, unflatten
from jaxspec.draft import families
from jaxspec.draft.family import with_shared
from jaxspec.groups import Groups, acoustic_similarity_groups
from jaxspec.models import builtin as voices
from jaxspec.models import placement as placements
from jaxspec.models import transformer
from jaxspec.models.builtin import MAX_CODES, MAX_SYMBOLS, STOP, VOICES, Voice
from jaxspec.models.placement import Placement
from jaxspec.sampling import Sampling
from jaxspec.synthesis.contract import Drafter, Requests, Settings, Synthesizer, drafter_of, target_of
from jaxspec.text import symbols
from jaxspec.types import Params

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
THRESHOLD = 0.85


def builtin() -> Synthesizer:
    """The voice that comes with the package, its weights on the device, or on the mesh that ``jax.set_mesh`` has set."""
    return _builtin(placements.current())


@functools.lru_cache
def _builtin(placement: Placement | None) -> Synthesizer:
    return synthesizer(voices.load(), placement)


def synthesizer(voice: Voice, placement: Placement | None = None) -> Synthesizer:
    """Any voice of its kind, on the first device or on a mesh, whose chips hold all of what does not divide evenly."""
    places = placement and (transformer.shardings_of(voice.target, placement, strict=False), placement.sharding())
    target_params, codec_params = (
        jax.device_put(params, places and places[i]) for i, params in enumerate((voice.target_params, voice.codec_params))
    )
    model = codec(voice.codec)
    kept_codec = model._replace(decode=keep(model.decode, f"decode {voice.codec}"))
    drafter = _drafter(voice, target_params, placement)

    def decode(rows: Sequence[np.ndarray], settings: Settings, watch: Stopwatch) -> list[np.ndarray]:
        """Decodes a batch of rows, all in the voice of the settings."""
        condition = np.full(len(rows), voices.voice_index(settings.voice or VOICES[0]), np.int32)
        return decode_rows(kept_codec, codec_params, rows, condition, watch=watch)

    return Synthesizer(
        target=target_of(voice.target, drafter),
        target_params=target_params,
        drafter=drafter,
        threshold=THRESHOLD,
        max_batch=16,
        sample_rate_hz=voice.codec.sample_rate_hz,
        pieces=lambda one: symbols.sentences(one, MAX_SYMBOLS),
        requests=_requests,
        groups=functools.partial(_groups, voice),
        codes=_codes,
        decode=decode,
        reference=_reference,
        context_frames=model.context_frames,
        voices=VOICES,
    )


def _drafter(voice: Voice, target_params: Params, placement: Placement | None) -> Drafter | None:
    """The draft that comes with the voice."""
    if voice.draft is None:
        return None
    description = records.from_json(DraftDescription, voice.draft)
    own = flatten(voice.draft_params)
    config = families.from_json(description.family, description.settings, voice.target.dtype)
    places = placement and families.shardings(description.family, config, placement, own)
    params = with_shared(unflatten(jax.device_put(own, places)), description.shared, target_params)
    built = pretrained.build_draft(description, params, voice.target.dtype, voices.BUILTIN)
    return drafter_of(built, dataclasses.replace(description, tuned={}))


def _requests(sentences: Sequence[str], settings: Settings) -> Requests:
    """The prompts of normalised sentences; a code lasts 40 ms, and no symbol is spoken for longer than four."""
    if settings.reference is not None or settings.instruct:
        _reference()
    prompts, length = voices.prompts(sentences, [settings.voice or VOICES[0]] * len(sentences))
    limit = np.minimum(min(MAX_CODES, settings.max_codes or MAX_CODES), 16 + 4 * length)
    return Requests(prompts, length, MAX_CODES, limit, (STOP,), [settings.sampling(SAMPLING)] * len(sentences))


def _reference(*recording: object) -> NoReturn:
    raise ValueError(
        "expected no reference or instruction for the built-in voice, got one: choose --voice slt or rms, or give --model"
    )


def _groups(voice: Voice, threshold: float, matrix: str) -> Groups:
    """The groups of codes that sound alike, kept in the cache in use; untrained codes and the stop id are singleton groups."""
    vectors, trained = voice.code_vectors(matrix), np.asarray(voice.trained, bool)
    folder = cache_folder("groups")
    if folder is None:
        return acoustic_similarity_groups(vectors, threshold, num_codes=STOP, trained=trained)
    parts = vectors.tobytes(), trained.tobytes(), repr(float(threshold)).encode(), Path(groups.__file__).read_bytes()
    path = folder / f"{hashlib.sha256(b''.join(parts)).hexdigest()}.npz"
    with contextlib.suppress(OSError, ValueError):
        return group_files.load(path)
    made = acoustic_similarity_groups(vectors, threshold, num_codes=STOP, trained=trained)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        group_files.save(path, made)
    return made


def _codes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.flatnonzero(ids < STOP)
    return ids[at], at
