"""What the loop carries and returns: State, Info and Generation, and the constants in them."""

from typing import NamedTuple

from jaxspec.types import Array, Cache, DraftState, SamplingRows

# Why a row finished.
RUNNING, STOP_TOKEN, LENGTH_LIMIT, NON_FINITE, INVALID_VERDICT = 0, 1, 2, 3, 4
# Where an emitted token comes from; PAD where there is none.
ACCEPTED, CORRECTION, BONUS = 0, 1, 2
PAD = -1


class Counts(NamedTuple):
    """The running totals of each row; the fields of ``Info`` of the same names."""

    rounds: Array
    drafted: Array
    accepted: Array
    accepted_per_position: Array
    exact_matches: Array


class State(NamedTuple):
    """What the loop carries. Every array has B as its leading axis, so that a row is a slot that can be refilled.

    Beyond a row's length, ``tokens`` and ``origin`` hold garbage.
    """

    tokens: Array  # int32 [B S], prompt and emitted tokens
    origin: Array  # int8 [B S], where each emitted token comes from
    start: Array  # int32 [B], the length of the prompt
    length: Array  # int32 [B], prompt and emitted tokens
    end: Array  # int32 [B], the length at which the row reaches its limit
    stop_reason: Array  # int32 [B], RUNNING until the row finishes
    keys: Array  # keys [B], never consumed: each round folds its position in
    sampling: SamplingRows  # fields [B]
    stop_ids: Array  # int32 [B, number of stop ids]; PAD where a row has fewer
    features: Array | None  # [B K+1 F], the target's features of the positions that the last round committed
    num_fresh: Array  # int32 [B], how many of them are valid
    cache: Cache  # the target's
    draft: DraftState
    counts: Counts


class Info(NamedTuple):
    """How the generation of each row went.

    Only emitted tokens count: tokens drafted beyond the end of a row are neither drafted nor accepted here. The number of emitted
    tokens is always accepted + corrections + bonus tokens.
    """

    rounds: Array  # int32 [B], rounds that emitted a token
    drafted: Array  # int32 [B]
    accepted: Array  # int32 [B]
    accepted_per_position: Array  # int32 [B K], how often the i-th drafted token of a round was accepted
    exact_matches: Array  # int32 [B], accepted tokens that the exact rule accepts too
    stop_reason: Array  # int32 [B]: STOP_TOKEN, LENGTH_LIMIT, NON_FINITE (NaN or infinite logits) or INVALID_VERDICT
    origin: Array  # int8 [B N]: ACCEPTED, CORRECTION or BONUS for each emitted token, then PAD


class Generation(NamedTuple):
    """The emitted tokens of each row; if the row stopped on a stop token, it is the last of them."""

    tokens: Array  # int32 [B N], padded with PAD
    length: Array  # int32 [B], the number of emitted tokens
    info: Info


class Emitted(NamedTuple):
    """The tokens that each row has emitted since the last look, for streaming."""

    tokens: Array  # int32 [B N], padded with PAD
    length: Array  # int32 [B], how many there are
    stop_reason: Array  # int32 [B], RUNNING while the row goes on
    origin: Array  # int8 [B N], where each comes from; PAD where there is none
    counts: Counts  # the running totals of each row
