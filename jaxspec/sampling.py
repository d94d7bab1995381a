"""From logits to a distribution, and from a distribution to a token: every probability that is sampled from or verified against.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; repetition-aware sampling, a mixture of
two distributions, comes last. Internally a token is described by its *gap*, its distance below the row's best logit in units of
the temperature: 0 for the best, infinity for a forbidden one. Gaps are not negative, so their bit patterns are ordered as their
values, and a threshold is found by bisection on 31 bits, exactly and without a sort.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from jaxspec import mesh
from jaxspec.keys import threefry_key
from jaxspec.types import Array, History, KeyLike, SamplingRows

MAX_WINDOW = 64  # bounds the gather of the repetition window; CosyVoice's window is 10
_MAX_PENALTY = 1e6  # keeps penalized logits finite in float32
_INFINITY_BITS = 0x7F800000
_ROUGH_STEPS, _ROUGH_STEP = 2**12, 2**-7  # of a limit that is found roughly: up to 32 temperatures below the best logit
BLOCK = 256  # of the two-level inverse of the distribution function; on a mesh a chip should hold whole ones
_FEW_ROWS = 4  # of a chip: gathering their distributions costs less than the all-reduces of a bisection
_FLOAT32 = np.finfo(np.float32)
_MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of one row. The defaults sample from the model's own distribution.

    Numbers may be Python or NumPy scalars; a bool is not a number.

    Args:
        temperature: divides the logits. 0 is greedy, the limit: all mass on the best token, the lowest id among equals.
        top_k: keep the k best tokens and any equal to the k-th; 0 is off.
        top_p: keep the best tokens up to and including the one at which their mass reaches top_p, and any equal to it; 1 is off.
        min_p: keep the tokens with at least min_p times the probability of the best one; 0 is off.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of the tokens in the prompt and the
            output, from 1e-6 to 1e6; 1 is off.
        repetition_window: W of repetition-aware sampling: a token drawn with the settings above that is among the last W emitted
            is drawn again from the whole softmax, without itself. Top-p then counts mass of the whole softmax, not of the top k,
            as in CosyVoice (top_k=25, top_p=0.8, repetition_window=10). At most 64; 0 is off.
        repetition_redraw_all: the second draw may give the repeated token again, as in CosyVoice before February 2026.
        withheld: an id that cannot be emitted before ``min_new_tokens`` tokens are; -1 is none.
        min_new_tokens: the number of emitted tokens before which ``withheld`` is forbidden; 0 is off.

    Raises:
        ValueError: a setting has the wrong type or is out of its range.
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
        self._check_temperature()
        self._check_real("top_p", math.ulp(0.0), 1, "in (0, 1]", "use 1 to keep every token")
        self._check_real("min_p", 0, 1, "in [0, 1]", "use 0 to keep every token")
        self._check_real("repetition_penalty", 1 / _MAX_PENALTY, _MAX_PENALTY, "from 1e-6 to 1e6", "use 1 for no penalty")
        self._check_whole("top_k", 0, _MAX_INT32, "use 0 to keep every token")
        self._check_whole("repetition_window", 0, MAX_WINDOW, "use 0 to turn it off")
        self._check_whole("withheld", -1, _MAX_INT32, "use -1 to withhold nothing")
        self._check_whole("min_new_tokens", 0, _MAX_INT32, "use 0 for no minimum")
        if not isinstance(self.repetition_redraw_all, (bool, np.bool_)):
            self._refuse("repetition_redraw_all", "to be True or False", "use False for the current CosyVoice")
        self._set("repetition_redraw_all", bool(self.repetition_redraw_all))

    def _check_temperature(self) -> None:
        remedy = "use 0 for greedy decoding, 1 for the model's own distribution"
        zero = _is_real(self.temperature) and self.temperature == 0
        low = 0 if zero else float(_FLOAT32.tiny)
        self._check_real("temperature", low, float(_FLOAT32.max), "to be 0 or a positive normal float32", remedy)

    def _check_real(self, name: str, low: float, high: float, expected: str, remedy: str) -> None:
        value = getattr(self, name)
        if not (_is_real(value) and low <= value <= high):
            self._refuse(name, expected, remedy)
        self._set(name, float(value))

    def _check_whole(self, name: str, low: int, high: int, remedy: str) -> None:
        value = getattr(self, name)
        if not (_is_real(value) and isinstance(value, numbers.Integral) and low <= int(value) <= high):
            self._refuse(name, f"to be a whole number from {low} to {high}", remedy)
        self._set(name, int(value))

    def _refuse(self, name: str, expected: str, remedy: str) -> None:
        raise ValueError(f"expected {name} {expected}, got {getattr(self, name)!r}: {remedy}")

    def _set(self, name: str, value: object) -> None:
        """Replaces a NumPy scalar by the Python value, so that equal settings compare and hash alike."""
        object.__setattr__(self, name, value)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def rows(sampling: Sampling | Sequence[Sampling], batch: int) -> SamplingRows:
    """The settings of a batch as arrays.

    Args:
        sampling: one setting for all rows, or one for each.
        batch: B.

    Returns:
        One field [B] for each setting.

    Raises:
        ValueError: neither a ``Sampling`` nor ``batch`` of them.
    """
    each = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != batch:
        raise ValueError(f"expected one Sampling or one for each of the {batch} rows, got {len(each)}: pass as many as rows")
    if not all(isinstance(row, Sampling) for row in each):
        raise ValueError(f"expected one Sampling for each of the {batch} rows, got {each!r}: make each with jaxspec.Sampling")

    def field(name: str, dtype: type) -> Any:
        return np.array([getattr(row, name) for row in each], dtype)

    settings = SamplingRows(
        temperature=field("temperature", np.float32),
        top_k=field("top_k", np.int32),
        top_p=field("top_p", np.float32),
        min_p=field("min_p", np.float32),
        repetition_penalty=field("repetition_penalty", np.float32),
        repetition_window=field("repetition_window", np.int32),
        repetition_redraw_all=field("repetition_redraw_all", bool),
        withheld=field("withheld", np.int32),
        min_new_tokens=field("min_new_tokens", np.int32),
    )
    return jax.device_put(settings)


def probabilities(
    logits: Float[Array, "*rows V"],
    sampling: Sampling | SamplingRows,
    history: History | None = None,
    rough: bool = False,
) -> Float32[Array, "*rows V"]:
    """The distribution that a row is sampled from.

    The fields of ``sampling`` and of ``history`` are aligned with the leading axes of ``logits`` from the left: settings [B] and
    tokens [B S] go with logits [B T V], where ``history.length`` may be [B], or [B T] for a block whose positions each see one
    more token of the same buffer. A filter that no row uses is skipped, except under ``vmap``: pass the whole batch instead.

    Args:
        logits: [... V], any float type; -inf forbids a token.
        sampling: one setting for all, or arrays as above. New values in the arrays do not recompile.
        history: the tokens before each position; needed only by the repetition settings and by ``min_new_tokens``.
        rough: whether top-k and top-p may keep tokens within 0.01 temperatures beyond their limit, and limits beyond 32 are none.
            For drafts, which may draw from any distribution: less than half of the reductions over V.

    Returns:
        float32 [... V], sums to 1. All NaN where a logit is NaN or +inf, where every logit is -inf, and where ``sampling`` holds
        arrays that need a history and there is none: callers check for NaN instead of for each case.

    Raises:
        ValueError: a ``Sampling`` that needs a history, and no history.

    >>> probabilities(jnp.array([1.0, 2.0, 2.0]), Sampling(top_k=2)).tolist()
    [0.0, 0.5, 0.5]
    >>> probabilities(jnp.array([1.0, 3.0, 3.0]), Sampling(temperature=0)).tolist()
    [0.0, 1.0, 0.0]
    """
    if isinstance(sampling, Sampling):
        if history is None and _needs_history(sampling):
            raise ValueError(
                "expected a history for repetition_window, repetition_penalty or min_new_tokens, got none: pass history="
            )
        sampling = jax.tree.map(lambda field: field.reshape(()), rows(sampling, 1))
    settings = jax.tree.map(lambda field: _align(field, logits.ndim), sampling)
    logits = logits.astype(jnp.float32)
    if history is not None:
        history = History(*(field.astype(jnp.int32) for field in history))
        logits = _withhold(_penalize(logits, settings.repetition_penalty, history), settings, history)
    gap = _gap(logits, settings.temperature)
    full = jnp.exp(-gap)
    kept = jnp.where(_keep(gap, full, settings, rough), full, 0.0)
    probs = kept / kept.sum(-1, keepdims=True)
    if history is None:
        return jnp.where(_needs_history(settings), jnp.nan, probs)
    return jax.lax.cond(
        (settings.repetition_window > 0).any(),
        lambda: _repetition_aware(logits, full, probs, settings, history),
        lambda: probs,
    )


def sample(key: KeyLike, probs: Float[Array, "*rows V"]) -> Int32[Array, "*rows"]:
    """Draws one token from each distribution by inversion; the key is consumed.

    Never draws a token of probability 0. An empty or NaN distribution gives a valid id without meaning.

    Args:
        key: a key of any implementation, see ``jaxspec.keys.threefry_key``; rows are independent under ``vmap`` too.
        probs: [... V], not negative; they need not sum to 1.

    Returns:
        int32 [...].
    """
    return invert(jax.random.uniform(threefry_key(key), (*probs.shape[:-1], 2), jnp.float32), probs)


def invert(uniforms: Float[Array, "*draws 2"], probs: Float[Array, "*rows V"]) -> Int32[Array, "*draws"]:
    """The token at two uniforms in [0, 1): the first chooses a block of the vocabulary, the second a token of the block.

    Two levels avoid a running sum over V, and the second uniform resolves probabilities that float32 loses beside the whole mass.

    Args:
        uniforms: [... 2], or [... N 2] with one more axis than the distributions for N draws from each.
        probs: [... V], not negative; they need not sum to 1.

    Returns:
        int32 [...] or [... N].

    >>> invert(jnp.array([[0.0, 0.1], [0.0, 0.9]]), jnp.array([1.0, 0.0, 1.0])).tolist()
    [0, 2]
    """
    uniforms, probs = uniforms.astype(jnp.float32), probs.astype(jnp.float32)
    if uniforms.ndim == probs.ndim:
        return invert(uniforms[..., None, :], probs)[..., 0]
    if probs.ndim > 1:
        return jax.vmap(invert)(uniforms, probs)
    vocab = probs.shape[0]
    width = min(BLOCK, vocab)
    count = -(-vocab // width)
    blocks = jnp.pad(probs, (0, count * width - vocab)).reshape(count, width)
    # On a mesh that divides the vocabulary, only the sums of the blocks and the blocks that are chosen are sent.
    uniforms = mesh.constrain(uniforms)
    block = _locate(uniforms[:, 0], jnp.broadcast_to(mesh.constrain(blocks.sum(-1)), (uniforms.shape[0], count)))
    block = mesh.constrain(block)
    return jnp.minimum(block * width + _locate(uniforms[:, 1], mesh.constrain(blocks[block])), vocab - 1)


def _locate(uniform: Float[Array, " N"], mass: Float[Array, "N L"]) -> Int32[Array, " N"]:
    """The first index with mass at which the running sum of ``mass`` [N L] exceeds uniform [N] times its total: int32 [N].

    If rounding leaves none, the last index with mass.
    """
    running = jnp.cumsum(mass, axis=-1)
    index = _ids(mass)
    passed = (running > uniform[:, None] * running[:, -1:]) & (mass > 0)
    first = jnp.where(passed, index, mass.shape[-1]).min(-1)
    last = jnp.where(mass > 0, index, 0).max(-1)
    return jnp.minimum(first, last)


def _needs_history(sampling: Sampling | SamplingRows) -> bool | Array:
    """Whether the distribution depends on the tokens before it."""
    window, penalty = sampling.repetition_window > 0, sampling.repetition_penalty != 1
    return window | penalty | ((sampling.min_new_tokens > 0) & (sampling.withheld >= 0))


def _align(field: Array, ndim: int) -> Array:
    """Appends axes to a setting so that its own axes are the leftmost of ``ndim``."""
    return field.reshape(field.shape + (1,) * (ndim - field.ndim))


def _ids(array: Array) -> Array:
    """The indices of the last axis, int32 [1 ... V], of the rank of ``array`` [... V]."""
    return jnp.arange(array.shape[-1], dtype=jnp.int32).reshape((1,) * (array.ndim - 1) + (-1,))


def _gap(logits: Float32[Array, "*rows V"], temperature: Array) -> Float32[Array, "*rows V"]:
    """Distance below the best logit in units of the temperature, 0 to inf; at temperature 0, inf for all but the best."""
    best = logits.max(-1, keepdims=True)
    gap = (best - logits) / jnp.where(temperature > 0, temperature, 1.0)

    def greedy() -> Array:
        return jnp.where((temperature > 0) | (_ids(gap) == _first_zero(gap)), gap, jnp.inf)

    # As any, not all: a mesh combines the reduction of rows with those of the other filters.
    return jax.lax.cond((temperature <= 0).any(), greedy, lambda: gap)


def _first_zero(gap: Array) -> Array:
    """The lowest id of the best tokens [... 1]; a reduction that vectorizes, as argmax does not on CPU."""
    return jnp.where(gap == 0, _ids(gap), gap.shape[-1]).min(-1, keepdims=True)


def _keep(
    gap: Float32[Array, "*rows V"], full: Float32[Array, "*rows V"], settings: SamplingRows, rough: bool
) -> Bool[Array, "*rows V"]:
    """The tokens that top-k, top-p and min-p keep, bool [... V]. ``full`` is exp(-gap)."""
    everything = jnp.full((*gap.shape[:-1], 1), jnp.inf, jnp.float32)
    limit_of = _rough_limit if rough else _limit

    def by_count() -> Array:
        count = jnp.where(settings.top_k > 0, settings.top_k.astype(jnp.float32), jnp.inf)
        return limit_of(gap, jnp.ones_like(gap), count)

    limit = jax.lax.cond((settings.top_k > 0).any(), by_count, lambda: everything)

    def by_mass() -> Array:
        whole = settings.repetition_window > 0
        total = jnp.where(whole | (gap <= limit), full, 0.0).sum(-1, keepdims=True)
        return jnp.minimum(limit, limit_of(gap, full, jnp.where(settings.top_p < 1, settings.top_p * total, jnp.inf)))

    limit = jax.lax.cond((settings.top_p < 1).any(), by_mass, lambda: limit)
    return (gap <= limit) & (full >= settings.min_p)


def _limit(gap: Float32[Array, "*rows V"], weight: Float32[Array, "*rows V"], bound: Array) -> Float32[Array, "*rows 1"]:
    """The largest limit [... 1] such that the weight of the gaps strictly below it is less than ``bound``.

    So the token that reaches the bound is kept, with all its equals. The best token is always kept.
    """
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    return bits(_bisect(gap, weight, bound, _INFINITY_BITS, bits))


def _rough_limit(gap: Float32[Array, "*rows V"], weight: Float32[Array, "*rows V"], bound: Array) -> Float32[Array, "*rows 1"]:
    """``_limit``, or up to a step more; inf where it is beyond the last step."""

    def limit(steps: Array) -> Array:
        return steps.astype(jnp.float32) * _ROUGH_STEP

    low = _bisect(gap, weight, bound, _ROUGH_STEPS - 1, limit)
    return jnp.where(low < _ROUGH_STEPS - 1, limit(low + 1), jnp.inf)


def _bisect(gap: Array, weight: Array, bound: Array, most: int, limit: Callable[[Array], Array]) -> Int32[Array, "*rows 1"]:
    """The largest of 0 .. ``most`` such that the weight of the gaps strictly below ``limit`` of it is less than ``bound``."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low + 1) // 2
        below = jnp.where(gap < limit(middle), weight, 0.0).sum(-1, keepdims=True)
        return jnp.where(below < bound, middle, low), jnp.where(below < bound, high, middle - 1)

    gap, weight = _gathered(gap), _gathered(weight)
    ends = jnp.zeros((*gap.shape[:-1], 1), jnp.int32), jnp.full((*gap.shape[:-1], 1), most, jnp.int32)
    low, _ = jax.lax.fori_loop(0, most.bit_length(), halve, ends)
    return low


def _gathered(values: Float32[Array, "*rows V"]) -> Float32[Array, "*rows V"]:
    """Values of a vocabulary that a mesh divides, whole on every chip where they are few; else as they are."""
    rows: list[str | None] = ["batch", None][: values.ndim - 1]
    if mesh.parts("vocab") == 1 or values.size > _FEW_ROWS * values.shape[-1] * mesh.parts("batch"):
        return values
    # They arrive divided, so that nothing is sent unless the branch of a ``cond`` that needs them is taken.
    return mesh.constrain(mesh.constrain(values, *rows, "vocab"), *rows)


def _penalize(logits: Array, penalty: Array, history: History) -> Array:
    """Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, with transformers' rule for negative logits."""
    vocab = logits.shape[-1]

    def penalized() -> Array:
        # The first place of each id serves every position of a block: an id is seen if it occurs before the length.
        place = jnp.arange(history.tokens.shape[-1], dtype=jnp.int32)

        def first_place(ids: Array) -> Array:
            return jnp.full(vocab, place.size, jnp.int32).at[ids].min(place, mode="drop")

        first = jnp.vectorize(first_place, signature="(s)->(v)")(_head_ids(history.tokens, vocab))
        first = first.reshape(*first.shape[:-1], *(1,) * (logits.ndim - first.ndim), vocab)
        seen = first < _align(history.length, logits.ndim)
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    return jax.lax.cond((penalty != 1).any(), penalized, lambda: logits)


def _withhold(logits: Array, settings: SamplingRows, history: History) -> Array:
    """Forbids one id while fewer than ``min_new_tokens`` tokens are emitted."""
    emitted = _align(history.length, logits.ndim) - _align(history.start, logits.ndim)
    forbidden = (_ids(logits) == settings.withheld) & (emitted < settings.min_new_tokens)
    return jnp.where(forbidden, -jnp.inf, logits)


def _head_ids(tokens: Array, vocab: int) -> Array:
    """The ids, with ``vocab`` in place of negative ones, which would count from the end: so ``mode="drop"`` drops both kinds."""
    return jnp.where(tokens >= 0, tokens, vocab)


def _repeated(settings: SamplingRows, history: History, shape: tuple[int, ...]) -> Array:
    """R, the tokens among the last W emitted: bool of ``shape`` [... V]."""
    vocab, ndim = shape[-1], len(shape)
    cells = history.tokens.shape[-1]
    tokens = history.tokens.reshape(*history.tokens.shape[:-1], *(1,) * (ndim - history.tokens.ndim), cells)
    back = jnp.arange(min(MAX_WINDOW, cells), dtype=jnp.int32).reshape((1,) * (ndim - 1) + (-1,))
    place = _align(history.length, ndim) - 1 - back
    inside = (place >= _align(history.start, ndim)) & (back < settings.repetition_window)
    inside = jnp.broadcast_to(inside, (*shape[:-1], back.size))
    place = jnp.broadcast_to(jnp.maximum(place, 0), inside.shape)
    recent = jnp.take_along_axis(jnp.broadcast_to(tokens, (*shape[:-1], cells)), place, axis=-1)

    def mark(ids: Array) -> Array:
        return jnp.zeros(vocab, bool).at[ids].set(True, mode="drop")

    return jnp.vectorize(mark, signature="(w)->(v)")(jnp.where(inside, _head_ids(recent, vocab), vocab))


def _repetition_aware(logits: Array, full: Array, nucleus: Array, settings: SamplingRows, history: History) -> Array:
    """Repetition-aware sampling (CosyVoice 2, arXiv 2412.10117; VALL-E 2, arXiv 2406.05370) in closed form.

    With n the filtered distribution (``nucleus``), f the full softmax and R the tokens of the window,
        probs(y) = n(y) 1[y not in R] + sum over x in R of n(x) f(y) 1[y != x] / (1 - f(x)),
    or, where the redraw may repeat, the second term n(R) f(y). The best token is treated separately: its 1 - f(x) may vanish, so
    the softmax is recomputed without it, which is also right at temperature 0. If no other token is allowed, it is emitted again.
    """
    repeated = _repeated(settings, history, logits.shape)
    full = full / full.sum(-1, keepdims=True)
    again = jnp.where(repeated, nucleus, 0.0)

    best = _ids(logits) == _first_zero(logits.max(-1, keepdims=True) - logits)
    others = jnp.where(best, -jnp.inf, logits)
    only = others.max(-1, keepdims=True) == -jnp.inf
    without_best = jnp.exp(-_gap(others, settings.temperature))
    without_best = jnp.where(only, best.astype(jnp.float32), without_best / without_best.sum(-1, keepdims=True))

    share = jnp.where(best, 0.0, again / jnp.where(best, 1.0, 1.0 - full))
    masked = jnp.where(best, again, 0.0).sum(-1, keepdims=True) * without_best
    masked += full * jnp.maximum(share.sum(-1, keepdims=True) - share, 0.0)
    unmasked = again.sum(-1, keepdims=True) * full
    return nucleus - again + jnp.where(settings.repetition_redraw_all, unmasked, masked)
