"""The whole way of the data on one page: text -> prompts -> [draft, score, verify, commit]* -> codes -> waves."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import text, verify
from jaxspec.codec.voice import codec
from jaxspec.draft import model_draft
from jaxspec.groups import Groups, acoustic_similarity_groups
from jaxspec.models import transformer
from jaxspec.models import voice as voices
from jaxspec.models.voice import MAX_CODES, MAX_SYMBOLS, STOP, Voice
from jaxspec.sampling import Sampling
from jaxspec.speculate import autoregressive, generate
from jaxspec.state import NON_FINITE, Generation
from jaxspec.stopwatch import Stopwatch
from jaxspec.types import Verify

VERIFIERS = ("exact", "tolerance", "coarse-grained", "autoregressive")
_MAX_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to speak.

    voice: a name of ``jaxspec.models.voice.VOICES``.
    verify: "exact", "tolerance" (SSD, with ``beta``), "coarse-grained" (PCG, with groups of cosine above ``threshold`` among the
        rows of ``matrix``: the "target"'s embeddings or the "codec"'s code vectors), or "autoregressive" (no draft).
    draft_length: K; 0 is autoregressive.

    Raises:
        ValueError: a setting out of its range.
    """

    voice: str = "slt"
    verify: str = "coarse-grained"
    beta: float = 0.2
    threshold: float = 0.85
    matrix: str = "target"
    draft_length: int = 3
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        voices.voice_index(self.voice)
        if self.verify not in VERIFIERS:
            raise ValueError(f"expected a verifier among {', '.join(VERIFIERS)}, got {self.verify!r}")
        if self.draft_length < 0:
            raise ValueError(f"expected a draft length of 0 (autoregressive) or more, got {self.draft_length}")
        if not -1 < self.threshold <= 1:
            raise ValueError(f"expected a threshold in (-1, 1], as it is a cosine, got {self.threshold}")
        if self.beta < 0:
            raise ValueError(f"expected a beta of 0 or more, got {self.beta}")
        self.sampling()

    def sampling(self) -> Sampling:
        """The law of the target and the draft."""
        return Sampling(temperature=self.temperature, top_p=self.top_p)

    def drafts(self) -> bool:
        """Whether a draft takes part."""
        return self.verify != "autoregressive" and self.draft_length > 0


class Speech(NamedTuple):
    """One text spoken. ``origin`` tells of each code whether it was accepted, a correction or a bonus, see ``jaxspec.state``."""

    wave: np.ndarray  # float32 [N], -1 .. 1
    codes: np.ndarray  # int32 [T]
    origin: np.ndarray  # int8 [T]
    sample_rate_hz: int


class Spoken(NamedTuple):
    """The speech of a list of texts, and what it took: counts summed over all codes, and seconds by part."""

    speeches: list[Speech]
    counts: dict[str, object]
    seconds: dict[str, float]


@functools.lru_cache
def builtin() -> Voice:
    """The voice that comes with the package, its weights on the device."""
    voice = voices.load()
    on_device = jax.device_put((voice.target_params, voice.draft_params, voice.codec_params))
    return voice._replace(target_params=on_device[0], draft_params=on_device[1], codec_params=on_device[2])


def speak(
    texts: Sequence[str], settings: Settings | None = None, voice: Voice | None = None, rule: Verify | None = None
) -> Spoken:
    """Speaks each text: long ones are cut into sentences, all sentences go through the models in batches, and are joined again.

    The same texts, settings and seed give the same samples. ``rule`` is what ``verifier`` makes of the settings; who speaks often
    makes it once.

    Raises:
        ValueError: a text is empty or cannot be pronounced, or the weights give laws that are not finite.
    """
    settings, voice = settings or Settings(), voice or builtin()
    pieces = [text.sentences(one, MAX_SYMBOLS) for one in texts]
    flat = list(itertools.chain.from_iterable(pieces))
    rule, watch, keys = rule or verifier(voice, settings), Stopwatch(), jax.random.split(jax.random.key(settings.seed), len(flat))
    spoken, generations = [], []
    for first in range(0, len(flat), _MAX_BATCH):
        some = slice(first, first + _MAX_BATCH)
        with watch("lm"):
            generation = codes_of(flat[some], keys[some], voice, settings, rule)
        with watch("codec"):
            spoken += decode(generation, voice, settings.voice)
        generations.append(generation)
    each = iter(spoken)
    joined = [_join(list(itertools.islice(each, len(some)))) for some in pieces]
    return Spoken(joined, count(generations, settings), watch.seconds)


def verifier(voice: Voice, settings: Settings) -> Verify:
    """The rule of acceptance that the settings name."""
    if settings.verify == "tolerance":
        return verify.tolerance(settings.beta)
    if settings.verify == "coarse-grained":
        return verify.coarse_grained(acoustic_groups(voice, settings))
    return verify.exact()


def acoustic_groups(voice: Voice, settings: Settings) -> Groups:
    """The groups of the codes that sound alike; codes that training never met, and the stop id, are alone."""
    vectors, trained = voice.code_vectors(settings.matrix), np.asarray(voice.trained, bool)
    return acoustic_similarity_groups(vectors, settings.threshold, num_codes=STOP, trained=trained)


def codes_of(sentences: Sequence[str], keys: jax.Array, voice: Voice, settings: Settings, rule: Verify) -> Generation:
    """Normalised sentences to codes, in one batch, on the host. ``keys`` has one key for each."""
    batch = 1 << (len(sentences) - 1).bit_length()  # few batch sizes, so that few are compiled
    filled = [*sentences, *sentences[:1] * (batch - len(sentences))]  # the rows that fill the batch up say nothing
    prompts, length = voices.prompts(filled, [settings.voice] * batch)
    limit = np.where(np.arange(batch) < len(sentences), np.minimum(MAX_CODES, 16 + 4 * length), 0)
    keys = keys[np.arange(batch) % len(sentences)]
    target = transformer.language_model(voice.target)
    shared = {"max_new_tokens": MAX_CODES, "limit": limit, "stop_ids": (STOP,), "sampling": settings.sampling()}
    if settings.drafts():
        draft = model_draft(transformer.language_model(voice.draft), settings.draft_length)
        models = (target, voice.target_params, draft, voice.draft_params)
        generation = generate(keys, *models, rule, prompts, length, **shared)
    else:
        generation = autoregressive(keys, target, voice.target_params, prompts, length, **shared)
    generation = jax.tree.map(lambda array: np.asarray(array)[: len(sentences)], generation)
    if (generation.info.stop_reason == NON_FINITE).any():
        raise ValueError("expected finite logits from the model, but some are NaN or infinite: its weights are damaged")
    return generation


def decode(generation: Generation, voice: Voice, name: str) -> list[Speech]:
    """A batch of codes to waves; the stop id is dropped."""
    lengths = [int(n) - int(row[n - 1] == STOP) for row, n in zip(generation.tokens, generation.length, strict=True)]
    codes = [row[:n] for row, n in zip(generation.tokens, lengths, strict=True)]
    origins = [row[:n] for row, n in zip(generation.info.origin, lengths, strict=True)]
    rate = voice.codec.sample_rate_hz
    return [Speech(*parts, rate) for parts in zip(decode_codes(codes, voice, name), codes, origins, strict=True)]


def decode_codes(codes: Sequence[np.ndarray], voice: Voice, name: str) -> list[np.ndarray]:
    """Rows of codes int32 [T] to waves float32 [N], as one batch: each row is padded with its last code to a round length."""
    speaks, span = codec(voice.codec, voices.voice_index(name)), voice.codec.samples_per_code
    width = -(-max(map(len, codes)) // 40) * 40 or 40
    padded = np.stack(
        [np.pad(row, (0, width - len(row)), mode="edge") if len(row) else np.zeros(width, np.int32) for row in codes]
    )
    waves = np.asarray(speaks.decode(voice.codec_params, padded[..., None]))
    return [np.clip(wave[: len(row) * span], -1, 1) for wave, row in zip(waves, codes, strict=True)]


def _join(speeches: list[Speech]) -> Speech:
    wave, codes, origin, rates = zip(*speeches, strict=True)
    return Speech(np.concatenate(wave), np.concatenate(codes), np.concatenate(origin), rates[0])


def count(generations: Sequence[Generation], settings: Settings) -> dict[str, object]:
    """The counts of some batches together, under the names of the field; see ``jaxspec.state.Info``."""
    infos = [generation.info for generation in generations]
    tokens = sum(int(generation.length.sum()) for generation in generations)
    rounds, drafted, accepted, exact = (
        sum(int(getattr(info, name).sum()) for info in infos) for name in ("rounds", "drafted", "accepted", "exact_matches")
    )
    positions = sum(info.accepted_per_position.sum(0) for info in infos)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_round": tokens / max(rounds, 1),
        "accepted_per_position": [float(n) / max(rounds, 1) for n in positions],
        "exact_match_rate": exact / accepted if accepted else 0.0,
        "verify": settings.verify if settings.drafts() else "autoregressive",
        "seed": settings.seed,
    }
