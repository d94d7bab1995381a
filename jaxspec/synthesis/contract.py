"""What a synthesizer is: models, prompts and decoder of one voice or checkpoint; and the settings of a synthesis."""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxspec.audio import files as audio_files
from jaxspec.checkpoint.descriptions import Tuned
from jaxspec.checkpoint.pretrained import PretrainedDraft
from jaxspec.common.compilation_cache import describe
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.groups import Groups
from jaxspec.mirror import Mirror
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.types import Draft, LanguageModel, Params
from jaxspec.verify.rules import Rule

Verifier = Literal[Rule, "autoregressive", "auto"]
VERIFIERS: tuple[str, ...] = typing.get_args(Verifier)
MATRICES = ("target", "codec")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A reference recording, whose voice the synthesis continues in.

    text: what the recording says; "" where the model is given the codes only or, with a condition, nothing of the recording.
    codes: its codes, int32 [T], or [T Q] where a frame has Q codes; T may be 0 with a condition.
    condition: what the codec's decoder is given of the recording, a pytree with leading axis 1; None: the codes, before those of
        the speech.

    Raises:
        ValueError: the codes are not a row of integers.
    """

    text: str
    codes: np.ndarray
    condition: Any = None

    def __post_init__(self) -> None:
        codes = np.asarray(self.codes)
        empty = not codes.size and self.condition is None
        if codes.ndim not in (1, 2) or not np.issubdtype(codes.dtype, np.integer) or empty:
            raise ValueError(f"expected reference codes, integers [T] or [T Q], got {codes.dtype} {codes.shape}: encode it again")
        object.__setattr__(self, "codes", codes.astype(np.int32))

    @classmethod
    def from_wav(cls, path: str | Path, synthesizer: "Synthesizer", text: str = "") -> "Reference":
        """Encodes a recording for a synthesizer, once for all texts.

        Args:
            path: a sound file (wav, flac, mp3, ogg).
            synthesizer: whose codec encodes it.
            text: what the recording says.

        Raises:
            ValueError: it is no recording of some seconds of speech, the synthesizer does not continue recordings, or the text is
                missing where the model needs it.
        """
        return synthesizer.reference(*audio_files.read(path), text)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to synthesize; None is the synthesizer's own default.

    voice: a name that the synthesizer knows.
    verify: "exact", "tolerance" (SSD, with ``beta``), "coarse-grained" (PCG, with groups of cosine above ``threshold`` among the
        rows of ``matrix``: the "target"'s embeddings or, of the built-in voice, the "codec"'s code vectors); one of these with
        "block-" before it, which verifies whole blocks; "autoregressive" (no draft); or "auto": the first batch of each size is
        autoregressive, the second coarse-grained, and the rest use whichever was faster, so the samples depend on the machine
        too. The default is what `jaxspec tune` chose for the draft, else coarse-grained, and autoregressive without a draft.
    draft_length: K; 0 is autoregressive. The default is what `jaxspec tune` chose, else 3, or as many as the draft can propose.
    temperature, top_k, top_p, min_p: see ``jaxspec.Sampling``.
    seed: any integer from 0 up.
    max_codes: the most tokens of a piece of text.
    reference: a recording to continue from.
    instruct: how to speak, in words, for a model that takes an instruction; the reference gives the voice alone then.

    Raises:
        ValueError: a setting out of its range.
    """

    voice: str | None = None
    verify: str | None = None
    beta: float = 0.2
    threshold: float | None = None
    matrix: str = "target"
    draft_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_codes: int | None = None
    reference: Reference | None = None
    instruct: str = ""

    def __post_init__(self) -> None:
        if self.verify not in (None, *VERIFIERS):
            raise ValueError(f"expected a verifier among {', '.join(VERIFIERS)}, got {self.verify!r}: choose one of them")
        if self.matrix not in MATRICES:
            raise ValueError(f"expected a matrix among {', '.join(MATRICES)}, got {self.matrix!r}: choose one of them")
        if not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(f"expected a beta from 0 (exact) to 1 (accept everything), got {self.beta!r}: the paper uses 0.4")
        if self.threshold is not None and not (_is_number(self.threshold) and -1 < self.threshold <= 1):
            raise ValueError(f"expected a threshold in (-1, 1], as it is a cosine, got {self.threshold!r}: 0.85 is usual")
        if self.draft_length is not None:
            _check_whole("a draft length", self.draft_length, 0, "0 is autoregressive")
        _check_whole("a seed", self.seed, 0, "0 is the default")
        if self.max_codes is not None:
            _check_whole("max_codes", self.max_codes, 1, "leave it out for the model's own limit")
        self.sampling(Sampling())

    def sampling(self, default: Sampling) -> Sampling:
        """How the target and the draft are sampled: ``default`` with what the settings name."""
        chosen = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return dataclasses.replace(default, **{name: value for name, value in chosen.items() if value is not None})

    def key(self) -> jax.Array:
        """The seed as a key: its lowest 32 bits make the key, and each further 32 bits are folded in."""
        seed, mask = operator.index(self.seed), 2**32 - 1
        key = jax.random.wrap_key_data(jax.device_put(np.array([0, seed & mask], np.uint32)), impl="threefry2x32")
        while seed := seed >> 32:
            key = jax.random.fold_in(key, np.uint32(seed & mask))
        return key


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(name: str, value: object, low: int, hint: str) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise ValueError(f"expected {name} of {low} or more, a whole number, got {value!r}: {hint}")


class Requests(NamedTuple):
    """One batch of requests, as the keyword arguments of ``jaxspec.generate``."""

    prompt: np.ndarray  # int32 [B P]
    prompt_length: np.ndarray  # int32 [B]
    max_new_tokens: int  # N, the capacity of the result
    limit: np.ndarray  # int32 [B], the most tokens of each row
    stop_ids: tuple[int, ...]
    sampling: Sampling | list[Sampling]  # one for all rows, or one for each


class Drafter(NamedTuple):
    """A drafter for a target.

    Attributes:
        make: K -> Draft; the same K gives the same object, so that a second call does not recompile.
        params: its parameters, on the device.
        feature_layers: the hidden states of the target that it reads, see ``transformer.Config``.
        max_length: the largest K; None: any.
        tuned: how it is used best, as `jaxspec tune` measured it; None: unknown.
    """

    make: Callable[[int], Draft]
    params: Params
    feature_layers: tuple[int, ...] = ()
    max_length: int | None = None
    tuned: Tuned | None = None


class Synthesizer(NamedTuple):
    """A target, perhaps a drafter, and the functions from text to prompts and from tokens to waves.

    target: it computes the features that the drafter reads.
    drafter: None: no draft.
    pieces(text) -> the parts of a text that are synthesized one by one.
    requests(pieces, settings) -> Requests, a row for each piece.
    groups(threshold, matrix) -> Groups of the head's vocabulary.
    codes(ids int32 [T]) -> (codes int32 [T'] or [T' Q], their places among the ids, of the same shape).
    decode(list of codes, settings, watch) -> their waves float32 [N], the seconds of each stage added to the watch; None where
        there is no codec.
    context_frames: of the codec, see ``jaxspec.types.Codec``: how many codes beside a code its sound depends on.
    voices: names that the settings may give, the default first.
    decode_growing: likewise for the codes so far of pieces that are still growing; None where ``decode`` does it.
    settled(number of codes so far, settings) -> of how many of them ``decode_growing`` gives the final sound.
    sizes(voice) -> what the programs of ``decode_growing`` are compiled for: voices of equal sizes share them.
    mirror(draft) -> the target and the draft on devices of their own; None where they share them.
    reference(wave float32 [N], sample rate in Hz, text) -> the recording as a reference; ValueError where that cannot be.
    """

    target: LanguageModel
    target_params: Params
    drafter: Drafter | None
    threshold: float  # the default
    max_batch: int
    sample_rate_hz: int
    pieces: Callable[[str], list[str]]
    requests: Callable[[Sequence[str], Settings], Requests]
    groups: Callable[[float, str], Groups]
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[Sequence[np.ndarray], Settings, Stopwatch], list[np.ndarray]] | None
    reference: Callable[[np.ndarray, int, str], Reference]
    context_frames: tuple[int | None, int | None] = (None, None)
    voices: tuple[str, ...] = ()
    decode_growing: Callable[[Sequence[np.ndarray], Settings, Stopwatch], list[np.ndarray]] | None = None
    settled: Callable[[int, Settings], int] | None = None
    sizes: Callable[[str], Hashable] | None = None
    mirror: Callable[[Draft], Mirror] | None = None

    @property
    def default_voice(self) -> str | None:
        """The first voice, if there is any."""
        return self.voices[0] if self.voices else None

    @property
    def decode_windows(self) -> Callable[[Sequence[np.ndarray], Settings, Stopwatch], list[np.ndarray]] | None:
        """What decodes the windows of a stream."""
        return self.decode_growing or self.decode


def drafter_of(loaded: PretrainedDraft, description: Any) -> Drafter:
    """A loaded draft as a drafter, whose traced programs are kept by its description."""
    described = describe(loaded.drafter, f"draft {description}")
    return Drafter(described, loaded.params, loaded.feature_layers, loaded.max_length, loaded.tuned)


def target_of(shape: transformer.Config, drafter: Drafter | None) -> LanguageModel:
    """The target's pure functions, computing the features that the drafter reads."""
    shape = dataclasses.replace(shape, feature_layers=drafter.feature_layers if drafter else ())
    return describe(transformer.language_model(shape), f"model {shape}")


def padded(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32 [B width], and their lengths."""
    ids = np.zeros((len(rows), width), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, np.array([len(row) for row in rows], np.int32)
