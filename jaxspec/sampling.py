"""From logits to a law, and from a law to a token: every probability that is sampled from or verified against is made here.

The order is that of transformers: repetition penalty -> temperature -> top-k -> top-p -> min-p; repetition-aware sampling, which
mixes two laws, comes last. Inside, a token is known by its *gap*, its distance below the row's best logit in units of the
temperature: 0 for the best, infinity for a forbidden one. Gaps are not negative, so their bit patterns have the order of their
values, and a threshold is found by bisection on 31 bits, exactly and without a sort.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxspec.types import Array, History, SamplingRows

MAX_WINDOW = 64  # bounds the gather of the repetition window; CosyVoice's window is 10
_INFINITY_BITS = 0x7F800000
_THREEFRY = "threefry2x32"
_BLOCK = 256  # of the two-level inverse of the distribution function


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a row is sampled. The defaults sample from the model's own law.

    temperature: 0 is greedy, the limit: all mass on the best token, the lowest id among equals.
    top_k: keep the k best tokens and whatever equals the k-th; 0 is off.
    top_p: keep the best tokens up to and with the one at which their mass reaches top_p, and whatever equals it; 1 is off.
    min_p: keep the tokens with at least min_p times the best one's probability; 0 is off.
    repetition_penalty: divides the positive logits, and multiplies the negative ones, of the tokens in the prompt and the output.
    repetition_window: W of repetition-aware sampling: a token drawn from the law above that is among the last W emitted is drawn
        again from the whole softmax, without itself. Top-p then counts mass of the whole softmax, not of the top k, as in
        CosyVoice (top_k=25, top_p=0.8, repetition_window=10). At most 64; 0 is off.
    repetition_redraw_all: the second draw may give the repeated token again, as in CosyVoice before February 2026.
    withheld: an id that does not come before ``min_new_tokens`` tokens were emitted; -1 is none.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0
    repetition_redraw_all: bool = False
    withheld: int = -1
    min_new_tokens: int = 0

    def __post_init__(self):
        _require(0 <= self.temperature < math.inf, "temperature", "a finite number, 0 or more", self.temperature)
        _require(_is_count(self.top_k), "top_k", "a whole number, 0 (off) or more", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]; 1 is off", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]; 0 is off", self.min_p)
        _require(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", "finite and above 0; 1 is off", self.repetition_penalty
        )
        _require(
            _is_count(self.repetition_window) and self.repetition_window <= MAX_WINDOW,
            "repetition_window",
            f"a whole number from 0 (off) to {MAX_WINDOW}",
            self.repetition_window,
        )
        _require(self.withheld == -1 or _is_count(self.withheld), "withheld", "an id, or -1 for none", self.withheld)
        _require(_is_count(self.min_new_tokens), "min_new_tokens", "a whole number, 0 (off) or more", self.min_new_tokens)


def _require(holds: bool, name: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, but is {came!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def rows(sampling: Sampling | Sequence[Sampling], batch: int) -> SamplingRows:
    """The settings of a batch as arrays [B]: one for all rows, or one for each.

    Raises:
        ValueError: a sequence whose length is not ``batch``.
    """
    each = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != batch:
        raise ValueError(f"expected one Sampling for each of the {batch} rows, but got {len(each)}")

    def field(name: str, dtype: type) -> Array:
        return jnp.asarray([getattr(row, name) for row in each], dtype)

    return SamplingRows(
        temperature=field("temperature", jnp.float32),
        top_k=field("top_k", jnp.int32),
        top_p=field("top_p", jnp.float32),
        min_p=field("min_p", jnp.float32),
        repetition_penalty=field("repetition_penalty", jnp.float32),
        repetition_window=field("repetition_window", jnp.int32),
        repetition_redraw_all=field("repetition_redraw_all", bool),
        withheld=field("withheld", jnp.int32),
        min_new_tokens=field("min_new_tokens", jnp.int32),
    )


def probabilities(logits: Array, sampling: Sampling | SamplingRows, history: History | None = None) -> Array:
    """The law that a row is sampled from.

    The fields of ``sampling`` and of ``history`` are aligned with the leading axes of ``logits`` from the left: settings [B] and
    tokens [B S] go with logits [B T V], where ``history.length`` may be [B], or [B T] for a block whose positions see ever more
    of the same buffer. What no row uses is skipped, unless this runs under ``vmap``: give it the batch.

    Args:
        logits: [... V], any float type; -inf forbids a token.
        sampling: one setting for all, or arrays as above. New values in the arrays compile nothing.
        history: what the rows have said; needed by the repetition settings and by ``min_new_tokens`` alone.

    Returns:
        float32 [... V], sums to 1. All NaN where a logit is NaN or +inf, where every logit is -inf, and where ``sampling`` holds
        arrays that ask for the history when there is none: callers look for NaN once instead of each case.

    Raises:
        ValueError: a ``Sampling`` that looks back, and no history.

    >>> probabilities(jnp.array([1.0, 2.0, 2.0]), Sampling(top_k=2)).tolist()
    [0.0, 0.5, 0.5]
    >>> probabilities(jnp.array([1.0, 3.0, 3.0]), Sampling(temperature=0)).tolist()
    [0.0, 1.0, 0.0]
    """
    if isinstance(sampling, Sampling):
        if history is None and _looks_back(sampling):
            raise ValueError(
                "repetition_window, repetition_penalty and min_new_tokens need a history, but none was given: pass history="
            )
        sampling = jax.tree.map(lambda field: field[0], rows(sampling, 1))
    settings = jax.tree.map(lambda field: _align(field, logits.ndim), sampling)
    logits = logits.astype(jnp.float32)
    if history is not None:
        logits = _withhold(_penalise(logits, settings.repetition_penalty, history), settings, history)
    gap = _gap(logits, settings.temperature)
    full = jnp.exp(-gap)
    kept = jnp.where(_keep(gap, full, settings), full, 0.0)
    law = kept / kept.sum(-1, keepdims=True)
    if history is None:
        return jnp.where(_looks_back(settings), jnp.nan, law)
    return jax.lax.cond(
        (settings.repetition_window > 0).any(),
        lambda: _repetition_aware(logits, full, law, settings, history),
        lambda: law,
    )


def sample(key: Array, probs: Array) -> Array:
    """Draws a token from each law by inversion; the key is consumed. int32 [...] from probs [... V].

    Never a token of probability 0. The law need not be normalised; of an empty or NaN one the token is an id and means nothing.
    """
    return invert(jax.random.uniform(threefry_key(key), (*probs.shape[:-1], 2), jnp.float32), probs)


def invert(uniforms: Array, probs: Array) -> Array:
    """The token at two uniforms of [0, 1): the first chooses a block of the vocabulary, the second a token of the block.

    In two levels there is no running sum over V, and the second uniform resolves what float32 could not beside the whole mass.

    Args:
        uniforms: float32 [... 2], or [... N 2] with one more axis than the laws for N draws from each.
        probs: [... V], not negative.

    Returns:
        int32 [...] or [... N].
    """
    if uniforms.ndim == probs.ndim:
        return invert(uniforms[..., None, :], probs)[..., 0]
    if probs.ndim > 1:
        return jax.vmap(invert)(uniforms, probs)
    vocab = probs.shape[0]
    width = min(_BLOCK, vocab)
    count = -(-vocab // width)
    blocks = jnp.pad(probs, (0, count * width - vocab)).reshape(count, width)
    block = _locate(uniforms[:, 0], jnp.broadcast_to(blocks.sum(-1), (uniforms.shape[0], count)))
    return jnp.minimum(block * width + _locate(uniforms[:, 1], blocks[block]), vocab - 1)


def threefry_key(key: Array) -> Array:
    """The key as a threefry2x32 key, whose draws stay independent under ``vmap``.

    ``rbg`` and ``unsafe_rbg`` keys do not: a vmapped draw takes the whole batch from the first row's key (documented in
    ``jax.random``, "Advanced RNG configuration"). Every function of jaxspec that consumes a key passes it through here first.

    Args:
        key: a key or keys [...] of any implementation, or raw uint32 key data [... 2] (threefry2x32) or [... 4] (rbg).

    Returns:
        threefry2x32 keys [...]: unchanged if they are threefry2x32 already, else derived from all words of their data.

    Raises:
        ValueError: not a key.

    >>> jax.random.key_impl(threefry_key(jax.random.key(0, impl="rbg")))
    'threefry2x32'
    """
    if not isinstance(key, jax.Array):
        raise ValueError(f"expected a key, got {type(key).__name__}: pass jax.random.key(0)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) == _THREEFRY:
            return key
        return _derive_keys(jax.random.key_data(key).reshape(*key.shape, -1))
    if key.dtype != jnp.uint32 or key.ndim == 0 or key.shape[-1] not in (2, 4):
        raise ValueError(f"expected a key, got an array {key.dtype} {key.shape}: pass jax.random.key(0)")
    return _derive_keys(key)


@jax.jit
def _derive_keys(data: Array) -> Array:
    """threefry2x32 keys [...] from uint32 words [... N], N >= 2: the first two are the key, the others are folded in."""

    def derive(words: Array) -> Array:
        key = jax.random.wrap_key_data(words[:2], impl=_THREEFRY)
        for word in words[2:]:
            key = jax.random.fold_in(key, word)
        return key

    return jax.vmap(derive)(data.reshape(-1, data.shape[-1])).reshape(data.shape[:-1])


def _locate(uniform: Array, mass: Array) -> Array:
    """The first index at which the running sum of ``mass`` [N L] passes uniform [N] times its total, among those with mass.

    Rounding may leave none: then it is the last index with mass.
    """
    running = jnp.cumsum(mass, axis=-1)
    index = jnp.arange(mass.shape[-1], dtype=jnp.int32)
    passed = (running > uniform[:, None] * running[:, -1:]) & (mass > 0)
    first = jnp.where(passed, index, mass.shape[-1]).min(-1)
    last = jnp.where(mass > 0, index, 0).max(-1)
    return jnp.minimum(first, last)


def _looks_back(sampling: Sampling | SamplingRows) -> bool | Array:
    """Whether a law depends on what was said."""
    window, penalty = sampling.repetition_window > 0, sampling.repetition_penalty != 1
    return window | penalty | ((sampling.min_new_tokens > 0) & (sampling.withheld >= 0))


def _align(field: Array, ndim: int) -> Array:
    """Puts a setting beside logits of ``ndim`` axes, its own axes leftmost."""
    return field.reshape(field.shape + (1,) * (ndim - field.ndim))


def _at(index: Array, size: int) -> Array:
    """True at one index of the last axis."""
    return jnp.arange(size) == index


def _gap(logits: Array, temperature: Array) -> Array:
    """Distance below the best logit in units of the temperature, 0 to inf; at temperature 0, inf for all but the best."""
    best = logits.max(-1, keepdims=True)
    gap = (best - logits) / jnp.where(temperature > 0, temperature, 1.0)

    def greedy() -> Array:
        return jnp.where((temperature > 0) | _at(_first_zero(gap), gap.shape[-1]), gap, jnp.where(gap >= 0, jnp.inf, gap))

    return jax.lax.cond((temperature > 0).all(), lambda: gap, greedy)


def _first_zero(gap: Array) -> Array:
    """The lowest id of the best tokens [... 1]; a reduction that vectorises, as argmax does not on CPU."""
    return jnp.where(gap == 0, jnp.arange(gap.shape[-1]), gap.shape[-1]).min(-1, keepdims=True)


def _keep(gap: Array, full: Array, settings: SamplingRows) -> Array:
    """Which tokens top-k, top-p and min-p leave, bool [... V]. ``full`` is exp(-gap)."""
    everything = jnp.full((*gap.shape[:-1], 1), jnp.inf)

    def by_count() -> Array:
        return _limit(gap, jnp.ones_like(gap), jnp.where(settings.top_k > 0, settings.top_k, jnp.inf))

    limit = jax.lax.cond((settings.top_k > 0).any(), by_count, lambda: everything)

    def by_mass() -> Array:
        whole = settings.repetition_window > 0
        total = jnp.where(whole | (gap <= limit), full, 0.0).sum(-1, keepdims=True)
        return jnp.minimum(limit, _limit(gap, full, jnp.where(settings.top_p < 1, settings.top_p * total, jnp.inf)))

    limit = jax.lax.cond((settings.top_p < 1).any(), by_mass, lambda: limit)
    return (gap <= limit) & (full >= settings.min_p)


def _limit(gap: Array, weight: Array, bound: Array) -> Array:
    """The largest limit [... 1] such that the weight of the gaps strictly below it is less than ``bound``.

    So the token that reaches the bound is kept, with all its equals. The best token is always kept.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low + 1) // 2
        below = jnp.where(gap < jax.lax.bitcast_convert_type(middle, jnp.float32), weight, 0.0).sum(-1, keepdims=True)
        return jnp.where(below < bound, middle, low), jnp.where(below < bound, high, middle - 1)

    ends = jnp.zeros((*gap.shape[:-1], 1), jnp.int32), jnp.full((*gap.shape[:-1], 1), _INFINITY_BITS, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, ends)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _penalise(logits: Array, penalty: Array, history: History) -> Array:
    """Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, with transformers' rule for negative logits."""
    vocab = logits.shape[-1]

    def penalised() -> Array:
        # The first place of each id serves every position of a block: what stands at or beyond the length is not yet said.
        place = jnp.arange(history.tokens.shape[-1])

        def first_place(ids: Array) -> Array:
            return jnp.full(vocab, place.size, jnp.int32).at[ids].min(place, mode="drop")

        first = jnp.vectorize(first_place, signature="(s)->(v)")(_head_ids(history.tokens, vocab))
        first = first.reshape(*first.shape[:-1], *(1,) * (logits.ndim - first.ndim), vocab)
        seen = first < _align(history.length, logits.ndim)
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    return jax.lax.cond((penalty != 1).any(), penalised, lambda: logits)


def _withhold(logits: Array, settings: SamplingRows, history: History) -> Array:
    """Forbids one id while fewer than ``min_new_tokens`` were emitted."""
    emitted = _align(history.length, logits.ndim) - _align(history.start, logits.ndim)
    forbidden = _at(settings.withheld, logits.shape[-1]) & (emitted < settings.min_new_tokens)
    return jnp.where(forbidden, -jnp.inf, logits)


def _head_ids(tokens: Array, vocab: int) -> Array:
    """Ids as they are, and ``vocab`` in place of those outside the head's vocabulary."""
    return jnp.where((tokens >= 0) & (tokens < vocab), tokens, vocab)


def _repeated(settings: SamplingRows, history: History, shape: tuple[int, ...]) -> Array:
    """R, the tokens among the last W emitted: bool of ``shape`` [... V]."""
    vocab, ndim = shape[-1], len(shape)
    cells = history.tokens.shape[-1]
    tokens = history.tokens.reshape(*history.tokens.shape[:-1], *(1,) * (ndim - history.tokens.ndim), cells)
    back = jnp.arange(min(MAX_WINDOW, cells))
    place = _align(history.length, ndim) - 1 - back
    inside = (place >= _align(history.start, ndim)) & (place >= 0) & (back < settings.repetition_window)
    inside = jnp.broadcast_to(inside, (*shape[:-1], back.size))
    recent = jnp.take_along_axis(
        jnp.broadcast_to(tokens, (*shape[:-1], cells)), jnp.broadcast_to(jnp.maximum(place, 0), inside.shape), axis=-1
    )

    def mark(ids: Array) -> Array:
        return jnp.zeros(vocab, bool).at[ids].set(True, mode="drop")

    return jnp.vectorize(mark, signature="(w)->(v)")(jnp.where(inside, _head_ids(recent, vocab), vocab))


def _repetition_aware(logits: Array, full: Array, nucleus: Array, settings: SamplingRows, history: History) -> Array:
    """Repetition-aware sampling (CosyVoice 2, arXiv 2412.10117; VALL-E 2, arXiv 2406.05370) in closed form.

    With n the nucleus law, f the full softmax and R the tokens of the window,
        law(y) = n(y) 1[y not in R] + sum over x in R of n(x) f(y) 1[y != x] / (1 - f(x)),
    or, where the redraw may repeat, the second term n(R) f(y). The best token is apart: its 1 - f(x) may vanish, so the softmax
    is made anew without it, which is also right at temperature 0. Where no other token is allowed, it is emitted again.
    """
    repeated = _repeated(settings, history, logits.shape)
    full = full / full.sum(-1, keepdims=True)
    again = jnp.where(repeated, nucleus, 0.0)

    best = _at(_first_zero(logits.max(-1, keepdims=True) - logits), logits.shape[-1])
    others = jnp.where(best, -jnp.inf, logits)
    alone = others.max(-1, keepdims=True) == -jnp.inf
    without_best = jnp.exp(-_gap(others, settings.temperature))
    without_best = jnp.where(alone, best, without_best / without_best.sum(-1, keepdims=True))

    share = jnp.where(best, 0.0, again / jnp.where(best, 1.0, 1.0 - full))
    masked = jnp.where(best, again, 0.0).sum(-1, keepdims=True) * without_best
    masked += full * jnp.maximum(share.sum(-1, keepdims=True) - share, 0.0)
    unmasked = again.sum(-1, keepdims=True) * full
    return nucleus - again + jnp.where(settings.repetition_redraw_all, unmasked, masked)
