"""What a speaker is: models, prompts and decoder of one voice or checkpoint; and the settings by which it speaks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.groups import Groups
from jaxspec.sampling import Sampling
from jaxspec.types import LanguageModel, Params

VERIFIERS = ("exact", "tolerance", "coarse-grained", "autoregressive", "auto")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to speak; None is the speaker's own default.

    voice: a name that the speaker knows.
    verify: "exact", "tolerance" (SSD, with ``beta``), "coarse-grained" (PCG, with groups of cosine above ``threshold`` among the
        rows of ``matrix``: the "target"'s embeddings or, of the built-in voice, the "codec"'s code vectors), or "autoregressive"
        (no draft), or "auto": of the batches of each size the first is coarse-grained, the second autoregressive, and the rest
        are whatever was quicker, so the samples depend on the machine too. The default is coarse-grained, and autoregressive
        where there is no draft.
    draft_length: K; 0 is autoregressive.
    max_codes: the most tokens of a piece of text.
    reference: what the reference says; reference_codes: its codes, which the speaker goes on from.

    Raises:
        ValueError: a setting out of its range.
    """

    voice: str | None = None
    verify: str | None = None
    beta: float = 0.2
    threshold: float | None = None
    matrix: str = "target"
    draft_length: int = 3
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_codes: int | None = None
    reference: str = ""
    reference_codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.verify not in (None, *VERIFIERS):
            raise ValueError(f"expected a verifier among {', '.join(VERIFIERS)}, got {self.verify!r}")
        if self.draft_length < 0:
            raise ValueError(f"expected a draft length of 0 (autoregressive) or more, got {self.draft_length}")
        if self.threshold is not None and not -1 < self.threshold <= 1:
            raise ValueError(f"expected a threshold in (-1, 1], as it is a cosine, got {self.threshold}")
        if self.beta < 0:
            raise ValueError(f"expected a beta of 0 or more, got {self.beta}")
        if self.max_codes is not None and self.max_codes < 1:
            raise ValueError(f"expected max_codes of 1 or more, got {self.max_codes}")
        if self.reference and not self.reference_codes:
            raise ValueError("expected the reference's codes with its text, got the text alone: give both")
        self.sampling(Sampling())

    def sampling(self, default: Sampling) -> Sampling:
        """The law of the target and the draft."""
        asked = {"temperature": self.temperature, "top_p": self.top_p}
        return dataclasses.replace(default, **{name: value for name, value in asked.items() if value is not None})


class Requests(NamedTuple):
    """What the loop is asked for, a row for each piece of text."""

    prompts: np.ndarray  # int32 [B P]
    length: np.ndarray  # int32 [B]
    limit: np.ndarray  # int32 [B], the most tokens of each
    sampling: list[Sampling]
    capacity: int  # N, the most that any row may be asked for


class Synthesizer(NamedTuple):
    """A target, perhaps a draft, and what stands around them.

    pieces(text) -> the parts of a text that are spoken one by one.
    requests(pieces, settings) -> Requests.
    groups(threshold, matrix) -> Groups of the head's vocabulary.
    codes(ids int32 [T]) -> (codes int32 [T'] or [T' Q], at: their places among the ids, of the same shape).
    decode(list of codes, settings) -> their waves float32 [N]; None where codes are all that comes out.
    """

    target: LanguageModel
    target_params: Params
    draft: LanguageModel | None
    draft_params: Params
    stop_ids: tuple[int, ...]
    threshold: float  # the default
    max_batch: int
    sample_rate_hz: int
    pieces: Callable[[str], list[str]]
    requests: Callable[[Sequence[str], Settings], Requests]
    groups: Callable[[float, str], Groups]
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[Sequence[np.ndarray], Settings], list[np.ndarray]] | None

    def rule(self, settings: Settings) -> str:
        """The verifier that the settings come to.

        Raises:
            ValueError: one that needs a draft, and there is none.
        """
        if settings.verify not in (None, "autoregressive") and settings.draft_length and self.draft is None:
            raise ValueError(f"expected a draft for {settings.verify}, got none: give --draft, or --verify autoregressive")
        if self.draft is None or settings.draft_length == 0:
            return "autoregressive"
        return settings.verify or "coarse-grained"


def padded(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32 [B width], and their lengths."""
    ids: Any = np.zeros((len(rows), width), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, np.array([len(row) for row in rows], np.int32)
