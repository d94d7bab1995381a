"""The contracts of jaxspec: what flows between target, draft, verifier and codec. No logic; read this file first.

Axes, in every docstring and annotation:

    B batch   P prompt   K drafted tokens   T block (K + 1 when the target scores a proposal)   S cells of a cache or buffer
    V vocabulary of the head   D width   F width of the target's features   H heads   G group size   Q codebooks   N samples

Distributions. p is the draft's and q the target's, as in the papers of SSD and PCG (Leviathan et al. 2022 swap the letters).

Ids. The *head's vocabulary* comes first: ids 0 .. V-1 are the speech codes and then the stop ids; only these are drafted, scored
and emitted. Ids from V upwards are rows of the input tables that occur in prompts only (text, voice names, markers).

Positions. Token ``t`` of a row's buffer has position ``t``, and cell ``t`` of a cache holds what was computed from it. A row of
length L has its last token at position L - 1. That token is fed again at the start of a round, so a cache needs to be valid for
positions below L - 1 only, and rolling back means setting the length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array
KeyLike = jax.Array  # a key, as jax.random.key gives, or its raw data
Params = Any  # a tree of arrays
Cache = Any  # a tree of arrays with B as the leading axis
DraftState = Any  # a tree of arrays with B as the leading axis
Condition = Any  # a tree of arrays with B as the leading axis, or None


@runtime_checkable
class Apply(Protocol):
    """Scores a block of tokens whose first one has position ``length``, and writes cells length .. length + T - 1.

    (params, tokens int32 [B T], cache, length int32 [B]) -> (logits [B T V], features [B T F] or None, cache). Logits are of any
    float type. The features of a position are hidden states computed from the tokens up to it; None where no draft needs them.
    """

    def __call__(self, params: Params, tokens: Array, cache: Cache, length: Array, /) -> tuple[Array, Array | None, Cache]:
        """Scores a block."""
        ...


@runtime_checkable
class InitCache(Protocol):
    """(batch, cells) -> a cache whose arrays have B as the leading axis and hold ``cells`` positions."""

    def __call__(self, batch: int, cells: int, /) -> Cache:
        """Makes an empty cache."""
        ...


class LanguageModel(NamedTuple):
    """A causal language model as two pure functions.

    Attributes:
        apply: see ``Apply``.
        init_cache: see ``InitCache``.
        vocab: V; None: found by tracing ``apply`` where it is needed.
        num_ids: the ids that ``apply`` accepts are 0 .. num_ids - 1; None: unknown, and prompts are not checked against it.
    """

    apply: Apply
    init_cache: InitCache
    vocab: int | None = None
    num_ids: int | None = None


class Split(NamedTuple):
    """A language model whose pass can stop halfway, at an early exit, and go on from there.

    Attributes:
        model: the whole of it; both parts take its parameters and its cache.
        lower: (params, tokens int32 [B T], cache, length int32 [B]) -> (hidden [B T D], the logits of the exit [B T V], cache).
        upper: (params, hidden [B T D], cache, length) -> (logits [B T V], cache), both as ``model.apply`` gives them.
    """

    model: LanguageModel
    lower: Callable[[Params, Array, Cache, Array], tuple[Array, Array, Cache]]
    upper: Callable[[Params, Array, Cache, Array], tuple[Array, Cache]]


class SamplingRows(NamedTuple):
    """The sampling settings of each row of a batch, each field [B] (or [] for one row); see ``jaxspec.Sampling``."""

    temperature: Array  # float32; 0 is greedy
    top_k: Array  # int32; 0 is off
    top_p: Array  # float32; 1 is off
    min_p: Array  # float32; 0 is off
    repetition_penalty: Array  # float32; 1 is off
    repetition_window: Array  # int32; 0 is off: repetition-aware sampling looks back over this many emitted tokens
    repetition_redraw_all: Array  # bool; the older variant: the redraw may give the repeated token again
    withheld: Array  # int32; an id that is not sampled before ``min_new_tokens``; -1 is none
    min_new_tokens: Array  # int32; 0 is off


class History(NamedTuple):
    """The tokens of a row before the position that is being sampled.

    ``tokens`` int32 [... S] is the buffer of prompt and emitted tokens: the prompt is tokens[:start], the emitted ones are
    tokens[start:length]. Ids outside the head's vocabulary are ignored. ``start`` and ``length`` are int32 [...].
    """

    tokens: Array
    start: Array
    length: Array


class Context(NamedTuple):
    """What a draft may read: the rows at the start of a round.

    The features are those of the positions that the last round committed: row i < num_fresh of ``features`` belongs to position
    length - 1 - num_fresh + i, so the newest one, row num_fresh - 1, predicted ``last``; the rows after it are garbage. In the
    first round num_fresh is 0, as ``Draft.init`` has been given the prompt's. ``last`` itself has no features yet.
    """

    tokens: Array  # int32 [B S], prompt and emitted tokens; garbage beyond a row's length
    start: Array  # int32 [B], the length of the row's prompt
    length: Array  # int32 [B], prompt and emitted tokens
    last: Array  # int32 [B], tokens[length - 1]
    features: Array | None  # [B T F], T = K + 1 (1 in the plain loop); None where the target computes none
    num_fresh: Array  # int32 [B], 0 .. T
    sampling: SamplingRows  # how the target samples; a draft follows it


class Proposal(NamedTuple):
    """K drafted tokens and the distribution that each was drawn from."""

    tokens: Array  # int32 [B K]
    probs: Array  # float32 [B K V]


@runtime_checkable
class InitDraft(Protocol):
    """The prefill of a draft.

    (params, prompt int32 [B P], prompt_length int32 [B], cells, features [B P F] or None) -> state, whose arrays have B as the
    leading axis, so that a row can be put into a running loop. Features are valid below each row's prompt_length.
    """

    def __call__(self, params: Params, prompt: Array, prompt_length: Array, cells: int, features: Array | None) -> DraftState:
        """Makes the state before the first round."""
        ...


@runtime_checkable
class Propose(Protocol):
    """(params, keys [B], context, state) -> (Proposal, state). Each row's key is consumed."""

    def __call__(self, params: Params, keys: Array, context: Context, state: DraftState) -> tuple[Proposal, DraftState]:
        """Proposes K tokens for every row."""
        ...


class Draft(NamedTuple):
    """Proposes tokens: a smaller model, heads on the target's features, a block drafter, an n-gram look-up.

    Attributes:
        length: K, static.
        init: see ``InitDraft``.
        propose: see ``Propose``.
    """

    length: int
    init: InitDraft
    propose: Propose


class Verdict(NamedTuple):
    """How many tokens of a proposal are accepted, and the token that follows them."""

    num_accepted: Array  # int32 [], 0 .. K: the accepted tokens are a prefix of the proposal
    token: Array  # int32 [], the correction after a rejection, the bonus token when all K are accepted
    num_exact: Array | None = None  # int32 [], how many of the accepted tokens the exact rule accepts with the same uniforms


@runtime_checkable
class Verify(Protocol):
    """A rule of acceptance for ONE sequence; the loop maps it over the batch with a key for each row.

    (key, draft_tokens int32 [K], draft_probs [K V], target_probs [K+1 V]) -> Verdict. A verifier that holds arrays is a
    ``jax.tree_util.Partial``, so that they are arguments of the compiled program and not constants in it.
    """

    def __call__(self, key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array, /) -> Verdict:
        """Accepts a prefix of the proposal."""
        ...


class Codec(NamedTuple):
    """Waves to codes and back, for batches of rows of different lengths.

    encode(params, wave float32 [B N], length int32 [B]) -> codes int32 [B T Q]
        ``length`` counts the valid samples of each row. A row has ``encoded_frames(length)`` frames; where that is None, a last
        frame that is partly valid counts. Codes after them are 0.
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
    # Of encode, where they are not what decode implies: the sample rate of its wave, and samples (int or array) -> frames.
    encode_rate_hz: int | None = None
    encoded_frames: Callable[[Any], Any] | None = None
    # For a decoder whose condition is the voice of a recording: (params, wave float32 [N], its rate in Hz) -> (the recording's
    # codes int32 [T], its condition with leading axis 1), on the host; None for other decoders.
    condition: Callable[[Params, np.ndarray, int], tuple[np.ndarray, Condition]] | None = None
    # The parts of ``decode`` by name, in order, for whoever times them: each takes its arguments, with the result of the part
    # before it in place of the codes. () where there is one part.
    stages: tuple[tuple[str, Callable[[Params, Any, Array, Condition, Array | None], Any]], ...] = ()
    # For a decoder that looks at the whole row, but can do otherwise: how a row is decoded that is still growing.
    growing: "Growing | None" = None


class Growing(NamedTuple):
    """How a codec decodes rows that are still growing: each time all the frames so far, of which the first are settled.

    Attributes:
        codec: the codec; the samples of settled frames do not change when frames are added.
        settled: (number of frames, condition of one row) -> how many of them are settled while the row grows.
    """

    codec: Codec
    settled: Callable[[int, Condition], int]
