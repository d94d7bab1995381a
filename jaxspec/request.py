"""The border of the loop: checks what a caller passes and turns it into one pytree of arrays."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxspec import mesh
from jaxspec import sampling as sampling_lib
from jaxspec.keys import threefry_key
from jaxspec.state import PAD
from jaxspec.types import Array, SamplingRows

StopIds = Sequence[int] | Sequence[Sequence[int]]  # for all rows, or for each


class Request(NamedTuple):
    """What a batch of rows asks for, as the compiled loop takes it."""

    keys: Array  # one key [], which is folded by row, or keys [B]
    prompt: Array  # int32 [B P]; ids beyond each row's length are ignored
    prompt_length: Array  # int32 [B], 1 .. P
    limit: Array  # int32 [B], the most tokens that a row may emit
    stop_ids: Array  # int32 [B, number of stop ids]; PAD where a row has fewer
    sampling: SamplingRows  # fields [B]


def check(
    key: Any,
    prompt: Any,
    prompt_length: Any,
    max_new_tokens: int,
    limit: Any = None,
    stop_ids: StopIds = (),
    sampling: Any = sampling_lib.Sampling(),  # noqa: B008, it is frozen
    *,
    vocab: int | None = None,
    num_ids: int | None = None,
) -> Request:
    """Checks a batch of requests, and puts it on the device. Values are checked unless they are traced.

    Args:
        key: one key, or keys [B].
        prompt: integers [B P].
        prompt_length: integers [B], 1 .. P.
        max_new_tokens: N, 1 or more.
        limit: 0 .. N for all rows, or integers [B]; None is N.
        stop_ids: ids for all rows, or a sequence of ids for each of the B rows.
        sampling: one ``Sampling`` for all rows, or a sequence of B.
        vocab: V, which stop ids lie below; None is not checked.
        num_ids: what prompt ids lie below; None is not checked.

    Raises:
        ValueError: an argument has the wrong shape, type or range.
    """
    if _whole(max_new_tokens, "max_new_tokens") < 1:
        raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    prompt = _integers(prompt, "prompt")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"expected a prompt [B P] with B and P of at least 1, got shape {prompt.shape}")
    batch, width = prompt.shape
    prompt_length = _per_row(prompt_length, "prompt_length", batch, 1, width)
    if _known(prompt, prompt_length):
        _check_ids(*mesh.fetch((prompt, prompt_length)), num_ids)
    limit = _limit(limit, batch, max_new_tokens)
    stops = _stop_ids(stop_ids, batch, vocab)
    return Request(
        keys=_keys(key, batch),
        prompt=_put(prompt),
        prompt_length=_put(prompt_length),
        limit=_put(limit),
        stop_ids=_put(stops),
        sampling=sampling_lib.rows(sampling, batch),
    )


def complete(request: Request) -> Request:
    """The request with a key for each row, keys [B], and zeros beyond each prompt's length."""
    batch, width = request.prompt.shape
    key = request.keys
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.int32))
    inside = jnp.arange(width, dtype=jnp.int32)[None] < request.prompt_length[:, None]
    return request._replace(keys=keys, prompt=jnp.where(inside, request.prompt, 0))


def filled_up(request: Request, multiple: int) -> Request:
    """The request with B a multiple of a number: the rows that are added emit nothing."""
    batch = request.prompt.shape[0]
    missing = -batch % multiple
    if not missing:
        return request
    rows = jnp.minimum(jnp.arange(batch + missing, dtype=jnp.int32), batch - 1)
    more = jax.tree.map(lambda values: values[rows] if values.ndim else values, request)
    return more._replace(limit=jnp.pad(request.limit, (0, missing)))


def _put(value: Any) -> Array:
    """An explicit transfer to the device, as int32."""
    return value.astype(jnp.int32) if isinstance(value, jax.Array) else jax.device_put(np.asarray(value, np.int32))


def _keys(key: Any, batch: int) -> Array:
    """One threefry2x32 key for all rows or one for each, checked; keys of other implementations are converted."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"expected a key, as jax.random.key(0) gives, or {batch} keys, got {type(key).__name__}")
    key = threefry_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"expected one key or {batch} keys, one for each row of the prompt, got keys of shape {key.shape}")
    return key


def _check_ids(prompt: np.ndarray, prompt_length: np.ndarray, num_ids: int | None) -> None:
    """Refuses prompts with ids that no table of the model holds."""
    ids = prompt[np.arange(prompt.shape[1]) < prompt_length[:, None]]
    if ids.min() < 0:
        raise ValueError("expected prompt ids from 0 up within each prompt_length, got a negative id: is prompt_length right?")
    bound = 2**31 if num_ids is None else num_ids
    if ids.max() >= bound:
        raise ValueError(f"expected prompt ids below {bound}, got {ids.max()}: is the prompt from the target's own tokenizer?")


def _stop_ids(stop_ids: StopIds, batch: int, vocab: int | None) -> np.ndarray:
    """int32 [B n]: the ids of each row, padded with PAD."""
    ids: Sequence[Any] = stop_ids
    rows = [list(row) for row in ids] if any(np.ndim(row) for row in ids) else [list(ids)] * batch
    if len(rows) != batch:
        raise ValueError(f"expected stop ids for all rows or for each of the {batch} rows, got those of {len(rows)} rows")
    if any(_whole(i, "a stop id") < 0 for row in rows for i in row):
        raise ValueError(f"expected stop ids from 0 up, got {stop_ids}")
    if vocab is not None and any(i >= vocab for row in rows for i in row):
        raise ValueError(f"expected stop ids within the head's vocabulary, 0 to {vocab - 1}, got {stop_ids}")
    width = max(map(len, rows))
    return np.array([[*row, *[PAD] * (width - len(row))] for row in rows], np.int32).reshape(batch, width)


def _limit(limit: Any, batch: int, max_new_tokens: int) -> Any:
    if limit is None or np.ndim(limit) == 0:
        limit = np.full(batch, max_new_tokens if limit is None else _whole(limit, "limit"))
    return _per_row(limit, "limit", batch, 0, max_new_tokens)


def _per_row(value: Any, name: str, batch: int, low: int, high: int) -> Any:
    """Integers [B] from ``low`` to ``high``."""
    value = _integers(value, name)
    if value.shape != (batch,):
        raise ValueError(f"expected {name} of shape ({batch},), one for each row of the prompt, got {value.shape}")
    if _known(value):
        numbers = mesh.fetch(value)
        if ((numbers < low) | (numbers > high)).any():
            raise ValueError(f"expected {name} from {low} to {high}, got {numbers.tolist()}")
    return value


def _integers(value: Any, name: str) -> Any:
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"expected {name} to hold integers, got {value.dtype}")
    return value


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} to be a whole number, got {value!r}") from None


def _known(*values: Any) -> bool:
    return not any(isinstance(value, Tracer) for value in values)
