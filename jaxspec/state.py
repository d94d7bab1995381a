"""What the loop carries and what it gives back: State, Info and Generation, and the constants in them."""

from typing import Any, NamedTuple

from jaxspec.types import Array, Cache, SamplingRows

# Why a row stopped.
RUNNING, STOP_TOKEN, LENGTH_LIMIT, NON_FINITE = 0, 1, 2, 3
# Where an emitted token comes from; -1 pads.
ACCEPTED, CORRECTION, BONUS = 0, 1, 2
PAD = -1


class Counts(NamedTuple):
    """What the rounds of each row came to so far; the fields of ``Info`` of the same names."""

    rounds: Array
    drafted: Array
    accepted: Array
    accepted_per_position: Array
    exact_matches: Array


class State(NamedTuple):
    """What the loop carries. Beyond a row's length, ``tokens`` and ``origin`` hold garbage."""

    tokens: Array  # int32 [B S], prompt and emitted tokens
    origin: Array  # int8 [B S], where each emitted token comes from
    start: Array  # int32 [B], the length of the prompt
    length: Array  # int32 [B], prompt and emitted tokens
    end: Array  # int32 [B], the length at which the row's limit is reached
    stop_reason: Array  # int32 [B], RUNNING until the row ends
    keys: Array  # keys [B], never consumed: each round folds its position in
    sampling: SamplingRows  # fields [B]
    stop_ids: Array  # int32 [number of stop ids]
    features: Array | None  # [B F], the target's features that predicted the last token
    cache: Cache  # the target's
    draft: Any  # the draft's own state
    counts: Counts


class Info(NamedTuple):
    """How each row went. Only what was emitted counts: what would lie beyond a row's end is neither drafted nor accepted.

    Emitted tokens = accepted + corrections + bonuses, always.
    """

    rounds: Array  # int32 [B], rounds that emitted something
    drafted: Array  # int32 [B]
    accepted: Array  # int32 [B]
    accepted_per_position: Array  # int32 [B K], how often the i-th drafted token of a round was accepted
    exact_matches: Array  # int32 [B], accepted tokens that the exact rule takes too
    stop_reason: Array  # int32 [B]: STOP_TOKEN, LENGTH_LIMIT or NON_FINITE (a law had NaN or infinity in it)
    origin: Array  # int8 [B N]: ACCEPTED, CORRECTION or BONUS for each emitted token, then PAD


class Generation(NamedTuple):
    """The emitted tokens of each row; a stop token, where one was drawn, is the last of them."""

    tokens: Array  # int32 [B N], padded with PAD
    length: Array  # int32 [B], how many were emitted
    info: Info
