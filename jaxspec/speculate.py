"""The loop: a draft proposes K tokens, the target scores K + 1, a verifier accepts a prefix, and the result is committed.

One round is ``step``: propose -> score -> verify_and_commit. ``generate`` runs rounds in one ``lax.while_loop`` until every row
has finished; nothing is read back to the host inside it, and the caches are updated in place. ``autoregressive`` is the plain
loop without a draft, the oracle that speculation is tested against. For streams and servers the same loop runs in segments:
``init``, then ``advance`` by some rounds, ``emitted`` to read what is new, ``admit`` to put a request into a finished row's slot;
without a draft these run the plain loop.

Invariants. Finished rows are unchanged. The randomness of a row depends on its own key and position only: the round that begins
at position t gives fold_in(row key, t) to the verifier, and the same of a second stream to the draft. So a request gets the same
draws alone, in any batch and in any slot; it gets the same tokens up to the rounding of the logits, which may depend on the shape
of the batch that a real model computes in.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec import checks, mesh, rounds
from jaxspec import request as requests
from jaxspec.request import Request, StopIds
from jaxspec.sampling import Sampling
from jaxspec.state import LENGTH_LIMIT, PAD, RUNNING, Counts, Emitted, Generation, Info, State
from jaxspec.types import Array, Draft, LanguageModel, Params, Verify

_DEFAULT = Sampling()


def generate(
    key: Array,
    target: LanguageModel,
    target_params: Params,
    draft: Draft,
    draft_params: Params,
    verify: Verify,
    prompt: Any,
    prompt_length: Any,
    *,
    max_new_tokens: int,
    limit: Any = None,
    stop_ids: StopIds = (),
    sampling: Sampling | Sequence[Sampling] = _DEFAULT,
) -> Generation:
    """Speculative generation for a batch of requests.

    The first call for given shapes, ``target``, ``draft`` and ``max_new_tokens`` compiles; pass the same ``target`` and ``draft``
    objects again to reuse the program. Keys, prompts, limits, stop ids, sampling, parameters and the arrays of ``verify`` may
    change.

    Args:
        key: one key (row r uses fold_in(key, r)) or keys [B], one per request. A request with a key of its own gets the same
            draws alone, in any batch and in any slot, and the same tokens up to the rounding of the logits.
        target: the model whose distribution is sampled.
        target_params: its parameters.
        draft: proposes ``draft.length`` tokens a round.
        draft_params: its parameters.
        verify: the rule of acceptance, see ``jaxspec.verify``.
        prompt: int32 [B P], padded on the right with anything.
        prompt_length: int32 [B], 1 .. P.
        max_new_tokens: N, the capacity of the result.
        limit: the most tokens that a row may emit, 0 .. N: one for all or int32 [B]; by default N.
        stop_ids: ids of the head's vocabulary that end a row, for all rows or a sequence of them for each; the one sampled is
            emitted.
        sampling: how every row is sampled, or a sequence of B.

    Returns:
        The emitted tokens and how each row went. A row whose distribution is not finite ends there, see ``Info.stop_reason``.

    Raises:
        ValueError: an argument has the wrong shape, type or range, or target, draft and verifier do not fit together.
    """
    request = check_request(key, target, target_params, prompt, prompt_length, max_new_tokens, limit, stop_ids, sampling)
    return generate_request(target, draft, max_new_tokens, target_params, draft_params, as_pytree(verify), request)


def autoregressive(
    key: Array,
    target: LanguageModel,
    target_params: Params,
    prompt: Any,
    prompt_length: Any,
    *,
    max_new_tokens: int,
    limit: Any = None,
    stop_ids: StopIds = (),
    sampling: Sampling | Sequence[Sampling] = _DEFAULT,
) -> Generation:
    """Plain generation, one token a step: the oracle. Args, Returns and Raises are those of ``generate``.

    The token at position t is sampled with fold_in(row key, t). Every token counts as a bonus token after zero drafted ones.
    """
    request = check_request(key, target, target_params, prompt, prompt_length, max_new_tokens, limit, stop_ids, sampling)
    return autoregressive_request(target, max_new_tokens, target_params, request)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def generate_request(
    target: LanguageModel,
    draft: Draft,
    capacity: int,
    target_params: Params,
    draft_params: Params,
    verify: Verify,
    request: Request,
) -> Generation:
    """The compiled program of ``generate``: a checked request with room for ``capacity`` emitted tokens in each row."""
    asked = request.prompt.shape[0]
    request = requests.filled_up(request, mesh.parts("batch"))
    cells = request.prompt.shape[1] + capacity + draft.length + 1
    state = _init(target, target_params, draft, draft_params, request, cells)
    round_ = functools.partial(rounds.step, target, target_params, draft, draft_params, verify)
    return first_rows(finish(jax.lax.while_loop(is_running, round_, state), capacity), asked)


@functools.partial(jax.jit, static_argnums=(0, 1))
def autoregressive_request(target: LanguageModel, capacity: int, target_params: Params, request: Request) -> Generation:
    """The compiled program of ``autoregressive``: a checked request with room for ``capacity`` emitted tokens in each row."""
    asked = request.prompt.shape[0]
    request = requests.filled_up(request, mesh.parts("batch"))
    cells = request.prompt.shape[1] + capacity + 1
    state, _ = prefill(target, target_params, requests.complete(request), cells, draft_length=0)
    round_ = functools.partial(rounds.plain_step, target, target_params)
    return first_rows(finish(jax.lax.while_loop(is_running, round_, state), capacity), asked)


def first_rows(generation: Generation, count: int) -> Generation:
    """Without the rows that filled up the batch."""
    return generation if count == len(generation.length) else jax.tree.map(lambda rows: rows[:count], generation)


# --- The loop in segments ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def init(
    target: LanguageModel, target_params: Params, draft: Draft | None, draft_params: Params, request: Request, cells: int
) -> State:
    """The state before the first round: prompts in place, target and draft prefilled.

    Args:
        target: the target.
        target_params: its parameters.
        draft: the draft; None: the plain loop, with K = 0.
        draft_params: its parameters.
        request: B checked requests, see ``request.check``.
        cells: S, static: the capacity of buffers and caches. A row needs prompt_length + limit + K + 1 of them.

    Raises:
        ValueError: the prompts do not fit, or target or draft do not keep their contracts.
    """
    return with_own_arrays(_init(target, target_params, draft, draft_params, request, cells))


def with_own_arrays(state: State) -> State:
    """A state that can be donated: an array that came into a program, or that comes out of it twice, cannot be."""
    small = state._replace(cache=None, draft=None, tokens=None, origin=None, features=None)
    return jax.tree.map(jnp.copy, small)._replace(
        cache=state.cache, draft=state.draft, tokens=state.tokens, origin=state.origin, features=state.features
    )


def _init(
    target: LanguageModel, target_params: Params, draft: Draft | None, draft_params: Params, request: Request, cells: int
) -> State:
    request = requests.complete(request)
    state, features = prefill(target, target_params, request, cells, _length(draft))
    if draft is None:
        return state
    return state._replace(draft=draft.init(draft_params, request.prompt, request.prompt_length, cells, features))


def advance(
    target: LanguageModel,
    target_params: Params,
    draft: Draft | None,
    draft_params: Params,
    verify: Verify | None,
    state: State,
    num_rounds: Array | int,
) -> State:
    """Runs at most ``num_rounds`` rounds, fewer when every row finishes earlier. ``state`` is donated.

    However the rounds are split, the tokens are those of ``generate``, or without a draft those of ``autoregressive``. Args as in
    ``init``, and the verifier, which only a draft needs.
    """
    return _advance(target, target_params, draft, draft_params, verify and as_pytree(verify), state, num_rounds)


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=5)
def _advance(
    target: LanguageModel,
    target_params: Params,
    draft: Draft | None,
    draft_params: Params,
    verify: Verify | None,
    state: State,
    num_rounds: Array | int,
) -> State:
    def go_on(carry: tuple[Array, State]) -> Array:
        return (carry[0] < num_rounds) & is_running(carry[1])

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        if draft is None:
            return carry[0] + 1, rounds.plain_step(target, target_params, carry[1])
        assert verify is not None
        return carry[0] + 1, rounds.step(target, target_params, draft, draft_params, verify, carry[1])

    return jax.lax.while_loop(go_on, body, (jnp.int32(0), state))[1]


@functools.partial(jax.jit, static_argnums=2)
def emitted(state: State, since: Array, width: int | None = None) -> Emitted:
    """What each row has emitted beyond its first ``since`` tokens, in arrays of its own; ``state`` stays usable.

    Args:
        state: of a running loop.
        since: int32 [B], tokens of each row that were read before.
        width: N, the most tokens to return for a row; by default the size of the buffer.
    """
    width = state.tokens.shape[1] if width is None else width
    length = jnp.clip(state.length - state.start - since, 0, width)
    tokens, origin = (_cut(buffer, state.start + since, length, width) for buffer in (state.tokens, state.origin))
    return jax.tree.map(mesh.constrain, Emitted(tokens, length, state.stop_reason, origin, state.counts))


def admit(
    target: LanguageModel,
    target_params: Params,
    draft: Draft | None,
    draft_params: Params,
    state: State,
    slot: Array | int,
    request: Request,
) -> State:
    """Prefills one request and puts it into a slot of a running state. ``state`` is donated; its other rows are unchanged.

    Compiles once for each width of the prompt: pad prompts to few widths.

    Args:
        target: as in ``init``, like the next three.
        target_params: its parameters.
        draft: the draft.
        draft_params: its parameters.
        state: of a running loop, with S cells.
        slot: 0 .. B-1, a row that has finished or is given up.
        request: of one row: prompt_length + limit + K + 1 is at most S, and it has no more stop ids than the state.

    Raises:
        ValueError: the request has several rows, or does not fit the state.
    """
    check_admission(draft, state, request)
    return admit_request(target, target_params, draft, draft_params, state, slot, request)


def check_admission(draft: Draft | None, state: State, request: Request) -> None:
    """The checks of ``admit``, whose Raises this has."""
    cells, num_stops = state.tokens.shape[1], state.stop_ids.shape[1]
    if request.prompt.shape[0] != 1 or request.stop_ids.shape[1] > num_stops:
        raise ValueError(
            f"expected a request of one row with at most {num_stops} stop ids, got one of {request.prompt.shape[0]} rows with "
            f"{request.stop_ids.shape[1]}: admit rows one by one, to a state made for as many stop ids"
        )
    prompt_length, limit = jax.device_get((request.prompt_length, request.limit))
    needed = int(prompt_length[0]) + int(limit[0]) + _length(draft) + 1
    if needed > cells:
        raise ValueError(f"expected a request that fits {cells} cells, got one that needs {needed}: lower its limit")


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=4)
def admit_request(
    target: LanguageModel,
    target_params: Params,
    draft: Draft | None,
    draft_params: Params,
    state: State,
    slot: Array | int,
    request: Request,
) -> State:
    """``admit`` without its checks."""
    missing = state.stop_ids.shape[1] - request.stop_ids.shape[1]
    request = request._replace(stop_ids=jnp.pad(request.stop_ids, ((0, 0), (0, missing)), constant_values=PAD))
    row = _init(target, target_params, draft, draft_params, request, state.tokens.shape[1])
    return jax.tree.map(lambda rows, one: jax.lax.dynamic_update_index_in_dim(rows, one[0], slot, 0), state, row)


@functools.partial(jax.jit, static_argnums=1)
def finish(state: State, capacity: int) -> Generation:
    """The emitted tokens, cut out of the buffers: tokens [B ``capacity``]; on a mesh every device has all of them."""
    length = state.length - state.start
    tokens = _cut(state.tokens, state.start, length, capacity)
    origin = _cut(state.origin, state.start, length, capacity)
    return jax.tree.map(mesh.constrain, Generation(tokens, length, Info(*state.counts, state.stop_reason, origin)))


def is_running(state: State) -> Array:
    """Whether any row is unfinished: bool []."""
    return jnp.any(state.stop_reason == RUNNING)


def check_request(
    key: Any,
    target: LanguageModel,
    target_params: Params,
    prompt: Any,
    prompt_length: Any,
    max_new_tokens: int,
    limit: Any,
    stop_ids: StopIds,
    sampling: Any,
) -> Request:
    """The request of a call of ``generate``, whose Args and Raises these are, checked against the target."""
    checks.check_mesh(target_params)
    vocab = None if len(stop_ids) == 0 else target.vocab or checks.vocab_size(target, target_params)
    return requests.check(
        key,
        prompt,
        prompt_length,
        max_new_tokens,
        limit,
        stop_ids,
        sampling,
        vocab=vocab,
        num_ids=target.num_ids,
    )


def _length(draft: Draft | None) -> int:
    """K; 0 where there is no draft."""
    return 0 if draft is None else draft.length


def as_pytree(verify: Verify) -> Verify:
    """A verifier that can be an argument of a compiled program."""
    return jax.tree_util.Partial(verify) if jax.tree_util.all_leaves([verify]) else verify


def prefill(target: LanguageModel, params: Params, request: Request, cells: int, draft_length: int) -> tuple[State, Array | None]:
    """The state with the target prefilled, and the target's features of the prompts [B P F]."""
    batch, width = request.prompt.shape
    if cells < width + draft_length + 1:  # the slack keeps the last block of a row inside
        raise ValueError(f"expected at least {width + draft_length + 1} cells for prompts of {width} tokens, got {cells}")
    zero = jnp.zeros(batch, jnp.int32)
    cache = target.init_cache(batch, cells)
    checks.check_cache(target, cache, batch, cells)
    features, cache = checks.check_scores(target.apply(params, request.prompt, cache, zero), cache, target.vocab, batch, width)
    fresh = None if features is None else jnp.zeros((batch, draft_length + 1, features.shape[-1]), features.dtype)
    state = State(
        tokens=jnp.zeros((batch, cells), jnp.int32).at[:, :width].set(request.prompt),
        origin=jnp.full((batch, cells), PAD, jnp.int8),
        start=request.prompt_length,
        length=request.prompt_length,
        end=request.prompt_length + request.limit,
        stop_reason=jnp.where(request.limit > 0, RUNNING, LENGTH_LIMIT).astype(jnp.int32),
        keys=request.keys,
        sampling=request.sampling,
        stop_ids=request.stop_ids,
        features=fresh,
        num_fresh=zero,
        cache=cache,
        draft=(),
        counts=Counts(zero, zero, zero, jnp.zeros((batch, draft_length), jnp.int32), zero),
    )
    return jax.tree.map(lambda rows: mesh.constrain(rows, "batch"), state._replace(cache=()))._replace(cache=cache), features


def _cut(buffer: Array, start: Array, length: Array, width: int) -> Array:
    """Of each row [S] the ``length`` [B] elements from ``start`` [B] on, padded with PAD: [B ``width``]."""
    position = jnp.arange(width, dtype=jnp.int32)[None]
    found = jnp.take_along_axis(buffer, start[:, None] + position, axis=1, mode="clip")
    return jnp.where(position < length[:, None], found, PAD)
