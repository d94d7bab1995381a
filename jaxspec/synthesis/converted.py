"""A converted checkpoint as a synthesizer: its prompts, its limits, its codec, and its groups, which are cached beside it."""

import contextlib
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec import groups as asg
from jaxspec.checkpoint import groups as group_files
from jaxspec.checkpoint import voices
from jaxspec.checkpoint.pretrained import Pretrained, PretrainedCodec
from jaxspec.codec.padding import decode_rows
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.groups import Groups
from jaxspec.models import card, int8
from jaxspec.synthesis import recording
from jaxspec.synthesis.contract import Drafter, Reference, Requests, Settings, Synthesizer, padded, target_of
from jaxspec.text import phonemes
from jaxspec.text.cut import halve

THRESHOLD = 0.4  # PCG found 0.38 to 0.45 best, arXiv 2511.13732
PIECE_TOKENS = 80  # of the longest piece of a text
_PROMPT_STEP, _CODES_STEP = 64, 256  # sizes are rounded up to these, so that few are compiled

_SENTENCE_ENDS = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])\s*|\s*\n\s*")
_BORDERS = [re.compile(r"\s+|(?<=[，、：])|(?<=[,:])(?!\d)")]  # not within 1,000 or 3:30


def synthesizer(target: Pretrained, drafter: Drafter | None = None, codec: PretrainedCodec | None = None) -> Synthesizer:
    """A converted target with a drafter, and the codec that it was trained with.

    Raises:
        ValueError: the codec is of another family than the target's.
    """
    model = target.model
    if codec is not None and codec.family != model.codec:
        raise ValueError(f"expected the codec {model.codec or 'of none'} for {model.family}, got {codec.family}")
    return Synthesizer(
        target=target_of(model.shape, drafter),
        target_params=target.params,
        drafter=drafter,
        threshold=THRESHOLD,
        max_batch=8,
        sample_rate_hz=codec.codec.sample_rate_hz if codec else 0,
        pieces=functools.partial(pieces, target),
        requests=functools.partial(_requests, target, codec),
        groups=lambda threshold, matrix: groups(target, threshold),
        codes=functools.partial(_codes, target),
        decode=codec and functools.partial(_decode, target, codec),
        reference=functools.partial(recording.reference, target, codec),
        context_frames=codec.codec.context_frames if codec else (None, None),
        voices=(*model.voices, *voices.names(target.folder)),
        **_growing(target, codec),
    )


def _growing(target: Pretrained, codec: PretrainedCodec | None) -> dict[str, Any]:
    """The fields of a synthesizer whose codec decodes rows that are still growing."""
    if codec is None or codec.codec.growing is None:
        return {}
    made, settled = codec.codec.growing
    changed = codec._replace(codec=made)

    def final(count: int, settings: Settings) -> int:
        reference = recording.of_settings(target, codec, settings)
        return settled(count, reference and reference.condition)

    def sizes(voice: str) -> Hashable:
        reference = recording.of_settings(target, codec, Settings(voice=voice))
        return tuple((array.shape, array.dtype) for array in jax.tree.leaves(reference and reference.condition))

    return {"decode_growing": functools.partial(_decode, target, changed), "settled": final, "sizes": sizes}


def pieces(target: Pretrained, text: str) -> list[str]:
    """A text in parts of at most ``PIECE_TOKENS`` tokens: as many whole sentences as fit; what is longer is halved.

    Warns:
        TextWarning: a word was longer than that and was broken up.

    Raises:
        ValueError: there is nothing to speak.
    """
    if not any(character.isalnum() for character in text):
        raise ValueError(f"expected a text with something to speak, got {text!r}")
    whole = [sentence.strip() for sentence in _SENTENCE_ENDS.split(text) if sentence.strip()]
    size = functools.partial(_size, target)
    sentences = [part for sentence in whole for part in halve(sentence, size, PIECE_TOKENS, _BORDERS)]
    joined = sentences[:1]
    for sentence in sentences[1:]:
        space = "" if unicodedata.east_asian_width(joined[-1][-1]) in "WF" else " "  # Chinese has none
        longer = joined[-1] + space + sentence
        if size(longer) <= PIECE_TOKENS:
            joined[-1] = longer
        else:
            joined.append(sentence)
    return joined


def _size(target: Pretrained, text: str) -> int:
    return len(card.tokenize(target.tokenizer, text))


def _requests(target: Pretrained, codec: PretrainedCodec | None, texts: Sequence[str], settings: Settings) -> Requests:
    """Prompts, and the limits of the family: of prompt and codes together, of codes, and of codes for each token of the text."""
    model, reference = target.model, recording.of_settings(target, codec, settings)
    sound = functools.partial(phonemes.of, language=model.phonemes) if model.phonemes else str
    sounds = [sound(text) for text in texts]
    spoken = _spoken(reference, settings.instruct, sound)
    voice = settings.voice if settings.voice in model.voices else ""
    rows = [card.prompt_ids(model, target.tokenizer, text, voice=voice, **spoken) for text in sounds]
    longest = max(map(len, rows))
    width = -(-longest // _PROMPT_STEP) * _PROMPT_STEP
    prompts, length = padded(rows, width)
    size = np.array([_size(target, text) for text in sounds])
    limits = [np.full(len(rows), limit) for limit in (model.max_new_tokens, settings.max_codes) if limit]
    if model.max_tokens:
        limits.append(model.max_tokens - length)
    if model.max_codes_per_token:
        limits.append(model.max_codes_per_token * size)
    limit = np.min(limits, axis=0).astype(np.int32)
    if limit.min() < 1:
        raise ValueError(f"expected prompts of less than {model.max_tokens} tokens, got {longest}: shorten text or reference")
    shared = settings.sampling(model.sampling)
    least = model.min_codes_per_token * size if model.min_codes_per_token else np.full(len(rows), shared.min_new_tokens)
    sampling = [dataclasses.replace(shared, min_new_tokens=int(count)) for count in least]
    return Requests(prompts, length, -(-int(limit.max()) // _CODES_STEP) * _CODES_STEP, limit, model.stop_ids, sampling)


def _spoken(reference: Reference | None, instruct: str, sound: Callable[[str], str]) -> dict[str, Any]:
    """What a prompt has of an instruction or a reference.

    Without the reference's text, a model whose decoder is given the voice continues nothing.
    """
    if instruct:
        return {"instruct": instruct.removesuffix("<|endofprompt|>")}
    if reference is None or (reference.condition is not None and not reference.text):
        return {}
    return {"reference": reference.text and sound(reference.text), "codes": reference.codes}


def _codes(target: Pretrained, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, at = card.codes_of(target.model, ids)
    return (codes[:, 0], at[:, 0]) if target.model.slots == 1 else (codes, at)


def _decode(
    target: Pretrained, codec: PretrainedCodec, rows: Sequence[np.ndarray], settings: Settings, watch: Stopwatch
) -> list[np.ndarray]:
    """Decodes a batch of rows in the voice of the reference.

    A codec that takes a condition is given the reference's. Otherwise each row continues the reference's codes, if the prompt
    ends with them, and their part of the wave is cut off.
    """
    reference, condition, prefix = recording.of_settings(target, codec, settings), None, None
    if reference is not None and reference.condition is not None:
        condition = jax.tree.map(lambda array: np.repeat(array, len(rows), axis=0), reference.condition)
    elif reference is not None and not target.model.clone:
        prefix = reference.codes
    return decode_rows(codec.codec, codec.params, rows, condition, prefix=prefix, watch=watch)


def groups(target: Pretrained, threshold: float, progress: Callable[[int, int], None] | None = None) -> Groups:
    """The acoustic similarity groups of a model's codes, from its input embeddings; made once and kept in its folder.

    Codes of different slots of a frame are never in one group, and neither are ids that are no code.
    ``progress(done, all)`` is called with the number of rows that are done, see ``jaxspec.groups``.
    """
    model, path = target.model, groups_path(target, threshold)
    vocab, count = model.shape.vocab, model.num_codes
    if path.exists():
        kept = group_files.load(path)
        if len(kept.token_start) == vocab:
            return kept
    firsts = [model.codes_first + slot * count for slot in range(model.slots)]
    tables = [np.asarray(int8.rows(target.params, "table_0", first, first + count), np.float32) for first in firsts]
    parts = [asg.acoustic_similarity_groups(table, threshold, progress=progress) for table in tables]
    made = asg.offset_groups(parts, firsts, vocab)
    with contextlib.suppress(OSError):  # a folder that is not ours to write to; they are made again the next time
        group_files.save(path, made)
    return made


def groups_path(target: Pretrained, threshold: float) -> Path:
    """Where the groups of a model are kept."""
    return target.folder / f"groups-{threshold:g}.npz"
