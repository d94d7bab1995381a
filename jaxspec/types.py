"""The contracts of jaxspec: what flows between target, draft, verifier and codec. No logic; read this file first.

Axes, in every docstring and annotation:
    B batch   K drafted tokens   T block of tokens (K + 1 when the target scores a proposal)   S cache cells / buffer length
    V vocabulary of the head     D width   F width of the target's features   H heads   G group size   Q codebooks   N samples

Ids. The *head's vocabulary* comes first: ids 0 .. V-1 are the speech codes and then the stop ids, and only these are drafted,
scored and emitted. Ids from V upwards are rows of the input tables that occur in prompts alone (text, voice names, markers).

Positions. Token ``t`` of a row's buffer has position ``t``, and cell ``t`` of a cache holds what was computed from it. A row of
length L has its last token at position L - 1; that token is always fed again at the start of a round, so caches need to be right
for positions below L - 1 alone, and to roll back is to set the length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any  # a tree of arrays
Cache = Any  # a tree of arrays with B as the leading axis
Condition = Any  # a tree of arrays with B as the leading axis, or None


class LanguageModel(NamedTuple):
    """A causal language model as two pure functions.

    apply(params, tokens int32 [B T], cache, length int32 [B]) -> (logits float32 [B T V], features [B T F] | None, cache)
        scores a block whose first token stands at position ``length``; writes cells length .. length + T - 1.
    init_cache(batch, cells) -> cache
    """

    apply: Callable[..., tuple[Array, Array | None, Cache]]
    init_cache: Callable[[int, int], Cache]


class SamplingRows(NamedTuple):
    """The sampling settings of each row of a batch, each field [B] (or [] for one row); see ``jaxspec.Sampling``."""

    temperature: Array  # float32; 0 is greedy
    top_k: Array  # int32; 0 is off
    top_p: Array  # float32; 1 is off
    min_p: Array  # float32; 0 is off
    repetition_penalty: Array  # float32; 1 is off
    repetition_window: Array  # int32; 0 is off: repetition-aware sampling looks back over so many emitted tokens
    repetition_redraw_all: Array  # bool; the older variant: the redraw may give the repeated token again
    withheld: Array  # int32; an id that does not come before ``min_new_tokens``; -1 is none
    min_new_tokens: Array  # int32; 0 is off


class History(NamedTuple):
    """What a row has said before the position that is being sampled.

    ``tokens`` int32 [... S] is the buffer of prompt and emitted tokens; the prompt is tokens[:start] and the emitted ones are
    tokens[start:length]. Ids outside the head's vocabulary are ignored. ``start`` and ``length`` are int32 [...].
    """

    tokens: Array
    start: Array
    length: Array


class Context(NamedTuple):
    """What a draft may look at: the rows as they stand at the start of a round."""

    tokens: Array  # int32 [B S], prompt and emitted tokens; what lies beyond a row's length is garbage
    start: Array  # int32 [B], the length of the row's prompt
    length: Array  # int32 [B], prompt and emitted tokens
    last: Array  # int32 [B], tokens[length - 1]
    features: Array | None  # [B F], the target's features that predicted ``last`` (zeros before the first round)
    sampling: SamplingRows  # the law by which the target samples; a draft follows it


class Proposal(NamedTuple):
    """K drafted tokens and the law that each was drawn from."""

    tokens: Array  # int32 [B K]
    probs: Array  # float32 [B K V]


class Draft(NamedTuple):
    """Something that proposes: a smaller model, heads on the target's features, a block drafter, an n-gram look-up.

    length: K, static.
    init(params, prompt int32 [B P], prompt_length int32 [B], cells) -> state       (the prefill)
    propose(params, keys [B], context, state) -> (Proposal, state)                  (keys: one per row, consumed)
    """

    length: int
    init: Callable[..., Any]
    propose: Callable[..., tuple[Proposal, Any]]


class Verdict(NamedTuple):
    """How much of a proposal stands, and the token that follows it."""

    num_accepted: Array  # int32 [], 0 .. K: the accepted tokens are a prefix of the proposal
    token: Array  # int32 [], the correction after a rejection, the bonus token when all K are accepted
    num_exact: Array | None = None  # int32 [], how many of the accepted the exact rule takes too, with the same uniforms


# verify(key, draft_tokens int32 [K], draft_probs [K V], target_probs [K+1 V]) -> Verdict, for ONE sequence; the loop vmaps it.
# A verifier with arrays in it is a jax.tree_util.Partial, so that they travel as arguments of the compiled program.
Verify = Callable[[Array, Array, Array, Array], Verdict]


class Codec(NamedTuple):
    """Waves to codes and back, for batches of rows of different lengths.

    encode(params, wave float32 [B N], length int32 [B]) -> codes int32 [B T Q]
        ``length`` counts the valid samples of each row; a last frame that is partly valid counts. Codes after it are 0.
    decode(params, codes int32 [B T Q], length int32 [B], condition, key) -> wave float32 [B T*samples_per_frame]
        ``length`` counts the valid frames of each row; samples after them are 0.
        ``condition`` is what else the decoder is given for each row, such as its voice; None where it takes nothing.
        ``key`` holds a PRNG key for each row [B] and is consumed; None where the decoder draws no noise, or to draw none.

    The result for a row depends on its valid part, its condition and its key, and not on padding, batch or slot.
    """

    encode: Callable[[Params, Array, Array], Array] | None  # None where there is no encoder
    decode: Callable[[Params, Array, Array, Condition, Array | None], Array]
    sample_rate_hz: int
    frame_rate_hz: float
    # How many frames to the left and to the right of a frame its samples depend on; None: all of them (global attention or
    # normalisation, recurrence). A causal decoder has 0 to the right.
    context_frames: tuple[int | None, int | None]
