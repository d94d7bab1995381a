"""The border of the loop: checks what a caller passes and turns it into one pytree of arrays."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling as laws
from jaxspec.keys import threefry_key
from jaxspec.types import Array, SamplingRows


class Request(NamedTuple):
    """What a batch of rows asks for, as the compiled loop takes it."""

    keys: Array  # keys [B]
    prompt: Array  # int32 [B P], zero beyond each row's length
    prompt_length: Array  # int32 [B]
    limit: Array  # int32 [B], the most tokens that a row may emit
    sampling: SamplingRows  # fields [B]


def check(
    key: Any,
    prompt: Any,
    prompt_length: Any,
    max_new_tokens: int,
    limit: Any,
    stop_ids: tuple[int, ...],
    sampling: Any,
) -> Request:
    """Checks a batch of requests; the arguments are those of ``jaxspec.generate``.

    Values are checked where they are known: not under a caller's own ``jit``.

    Raises:
        ValueError: an argument has the wrong shape, type or range.
    """
    if _whole(max_new_tokens, "max_new_tokens") < 1:
        raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    if any(_whole(i, "a stop id") < 0 for i in stop_ids):
        raise ValueError(f"expected stop ids from 0 up, got {stop_ids}")
    prompt = _integers(prompt, "prompt")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"expected a prompt [B P] with B and P of at least 1, got shape {prompt.shape}")
    batch, width = prompt.shape
    prompt_length = _per_row(prompt_length, "prompt_length", batch, 1, width)
    if _known(prompt, prompt_length) and (np.asarray(prompt)[np.arange(width) < np.asarray(prompt_length)[:, None]] < 0).any():
        raise ValueError("expected prompt ids from 0 up within each prompt_length, got a negative id; is prompt_length right?")
    limit = _limit(limit, batch, max_new_tokens)
    return _complete(_keys(key, batch), prompt, prompt_length, limit, laws.rows(sampling, batch))


@jax.jit
def _complete(key: Array, prompt: Array, prompt_length: Array, limit: Array, sampling: SamplingRows) -> Request:
    """Folds one key by each row's index, and clears the padding."""
    batch, width = prompt.shape
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    prompt = jnp.where(jnp.arange(width) < prompt_length[:, None], prompt, 0)
    return Request(keys, prompt.astype(jnp.int32), prompt_length.astype(jnp.int32), limit.astype(jnp.int32), sampling)


def _keys(key: Any, batch: int) -> Array:
    """One threefry2x32 key for all rows or one for each, checked; keys of other implementations are converted."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"expected a key, as jax.random.key(0) gives, or {batch} keys, got {type(key).__name__}")
    key = threefry_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"expected one key or {batch} keys, one for each row of the prompt, got keys of shape {key.shape}")
    return key


def _limit(limit: Any, batch: int, max_new_tokens: int) -> Any:
    if limit is None or np.ndim(limit) == 0:
        limit = np.full(batch, max_new_tokens if limit is None else _whole(limit, "limit"))
    return _per_row(limit, "limit", batch, 0, max_new_tokens)


def _per_row(value: Any, name: str, batch: int, low: int, high: int) -> Any:
    """Integers [B] from ``low`` to ``high``."""
    value = _integers(value, name)
    if value.shape != (batch,):
        raise ValueError(f"expected {name} of shape ({batch},), one for each row of the prompt, got {value.shape}")
    if _known(value) and ((np.asarray(value) < low) | (np.asarray(value) > high)).any():
        raise ValueError(f"expected {name} from {low} to {high}, got {np.asarray(value).tolist()}")
    return value


def _integers(value: Any, name: str) -> Any:
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"expected {name} to hold integers, got {value.dtype}")
    return value


def _whole(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} to be a whole number, got {value!r}") from None


def _known(*values: Any) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)
