"""The loop: a draft proposes K tokens, the target scores K + 1, a verifier judges, and what stands is committed.

One round is ``step``: propose -> score -> judge (verify, commit). ``generate`` runs rounds in one ``lax.while_loop`` until every
row has ended; nothing is read back to the host inside it, and the caches live and die inside the compiled program, in place.
``autoregressive`` is the plain loop without a draft: the oracle that speculation is held to.

Invariants: a row that has ended does not move. Token t of a row depends on the row's own key and on nothing else in the batch:
the round that begins at position t gives fold_in(row key, t) to the verifier, and the same of a second stream to the draft.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec import request as requests
from jaxspec import sampling as laws
from jaxspec.request import Request
from jaxspec.sampling import Sampling
from jaxspec.state import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    LENGTH_LIMIT,
    NON_FINITE,
    PAD,
    RUNNING,
    STOP_TOKEN,
    Counts,
    Generation,
    Info,
    State,
)
from jaxspec.types import Array, Context, Draft, History, LanguageModel, Params, Proposal, Verdict, Verify

_DRAFT_STREAM = 2**31 - 1  # beyond every position, so that the draft's keys and the verifier's never meet
_PLAIN = Sampling()


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
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling | Sequence[Sampling] = _PLAIN,
) -> Generation:
    """Speculative generation of a batch of requests.

    The first call for given shapes, ``target``, ``draft``, ``max_new_tokens`` and ``stop_ids`` compiles; pass the same ``target``
    and ``draft`` objects again to reuse it. Keys, prompts, limits, sampling, parameters and the arrays of ``verify`` may change.

    Args:
        key: one key (row r uses fold_in(key, r)) or keys [B], one per request: a request with its own key gives the same tokens
            alone, in any batch and in any slot.
        target: the model whose law is sampled, with its ``target_params``.
        draft: proposes ``draft.length`` tokens a round, with its ``draft_params``.
        verify: the rule of acceptance, see ``jaxspec.verify``.
        prompt: int32 [B P], padded on the right with anything.
        prompt_length: int32 [B], 1 .. P.
        max_new_tokens: N, the capacity of the result.
        limit: the most tokens that a row may emit, 0 .. N: one for all or int32 [B]; by default N.
        stop_ids: ids of the head's vocabulary that end a row; the one drawn is emitted.
        sampling: the law of every row, or a sequence of B.

    Returns:
        The emitted tokens and how each row went. A row whose law is not finite ends there, see ``Info.stop_reason``.

    Raises:
        ValueError: an argument has the wrong shape, type or range.
    """
    verify = jax.tree_util.Partial(verify) if jax.tree_util.all_leaves([verify]) else verify
    request = requests.check(key, prompt, prompt_length, max_new_tokens, limit, stop_ids, sampling)
    return _generate(target, draft, max_new_tokens, tuple(stop_ids), target_params, draft_params, verify, request)


def autoregressive(
    key: Array,
    target: LanguageModel,
    target_params: Params,
    prompt: Any,
    prompt_length: Any,
    *,
    max_new_tokens: int,
    limit: Any = None,
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling | Sequence[Sampling] = _PLAIN,
) -> Generation:
    """Plain generation, one token a step: the oracle. Same arguments and Raises as ``generate``.

    The token at position t is drawn with fold_in(row key, t). Every token counts as a bonus after zero drafted ones.
    """
    request = requests.check(key, prompt, prompt_length, max_new_tokens, limit, stop_ids, sampling)
    return _autoregressive(target, max_new_tokens, tuple(stop_ids), target_params, request)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    target: LanguageModel,
    draft: Draft,
    capacity: int,
    stop_ids: tuple[int, ...],
    target_params: Params,
    draft_params: Params,
    verify: Verify,
    request: Request,
) -> Generation:
    state = init(target, target_params, draft, draft_params, request, capacity, stop_ids)
    advance = functools.partial(step, target, target_params, draft, draft_params, verify)
    return finish(jax.lax.while_loop(is_running, advance, state), capacity)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _autoregressive(
    target: LanguageModel, capacity: int, stop_ids: tuple[int, ...], target_params: Params, request: Request
) -> Generation:
    def advance(state: State) -> State:
        logits, features, cache = target.apply(target_params, _last(state)[:, None], state.cache, state.length - 1)
        law = laws.probabilities(logits, state.sampling, History(state.tokens, state.start, state.length))
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
        token = jax.vmap(laws.sample)(keys, law[:, 0])
        nothing = Proposal(jnp.zeros((token.shape[0], 0), jnp.int32), law[:, :0])
        verdict = Verdict(jnp.zeros_like(token), token)
        return commit(state._replace(cache=cache), nothing, verdict, _is_law(law)[:, 0].astype(jnp.int32), features)

    state = _prefill(target, target_params, request, capacity, stop_ids, draft_length=0)
    return finish(jax.lax.while_loop(is_running, advance, state), capacity)


def init(
    target: LanguageModel,
    target_params: Params,
    draft: Draft,
    draft_params: Params,
    request: Request,
    capacity: int,
    stop_ids: tuple[int, ...] = (),
) -> State:
    """The state before the first round: prompts in place, target and draft prefilled; room for ``capacity`` emitted tokens."""
    state = _prefill(target, target_params, request, capacity, stop_ids, draft.length)
    cells = state.tokens.shape[1]
    return state._replace(draft=draft.init(draft_params, request.prompt, request.prompt_length, cells))


def _prefill(
    target: LanguageModel, params: Params, request: Request, capacity: int, stop_ids: tuple[int, ...], draft_length: int
) -> State:
    batch, width = request.prompt.shape
    cells = width + capacity + draft_length + 1  # the slack keeps the last block of a row inside
    zero = jnp.zeros(batch, jnp.int32)
    logits, features, cache = target.apply(params, request.prompt, target.init_cache(batch, cells), zero)
    if any(i >= logits.shape[-1] for i in stop_ids):
        raise ValueError(f"expected stop ids within the head's vocabulary, 0 to {logits.shape[-1] - 1}, got {stop_ids}")
    return State(
        tokens=jnp.zeros((batch, cells), jnp.int32).at[:, :width].set(request.prompt),
        origin=jnp.full((batch, cells), PAD, jnp.int8),
        start=request.prompt_length,
        length=request.prompt_length,
        end=request.prompt_length + request.limit,
        stop_reason=jnp.where(request.limit > 0, RUNNING, LENGTH_LIMIT).astype(jnp.int32),
        keys=request.keys,
        sampling=request.sampling,
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
        features=None if features is None else jnp.zeros_like(features[:, 0]),
        cache=cache,
        draft=(),
        counts=Counts(zero, zero, zero, jnp.zeros((batch, draft_length), jnp.int32), zero),
    )


def is_running(state: State) -> Array:
    """Whether any row has not ended: bool []."""
    return jnp.any(state.stop_reason == RUNNING)


def step(target: LanguageModel, target_params: Params, draft: Draft, draft_params: Params, verify: Verify, state: State) -> State:
    """One round for every row; rows that have ended are computed along and left as they are."""
    proposal, state = propose(draft, draft_params, state)
    target_probs, features, state = score(target, target_params, proposal, state)
    _check_proposal(proposal, draft.length, target_probs)
    return judge(verify, state, proposal, target_probs, features)


def propose(draft: Draft, params: Params, state: State) -> tuple[Proposal, State]:
    """The draft's K tokens and their laws."""
    keys = jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, _DRAFT_STREAM), at))(state.keys, state.length)
    context = Context(state.tokens, state.start, state.length, _last(state), state.features, state.sampling)
    proposal, draft_state = draft.propose(params, keys, context, state.draft)
    return proposal, state._replace(draft=draft_state)


def score(target: LanguageModel, params: Params, proposal: Proposal, state: State) -> tuple[Array, Array | None, State]:
    """The target's laws float32 [B K+1 V] after the last token and each drafted one, and its features [B K+1 F].

    Each law sees the tokens drafted before it as its history, as it would had they been emitted.
    """
    block = jnp.concatenate([_last(state)[:, None], proposal.tokens], axis=1)
    logits, features, cache = target.apply(params, block, state.cache, state.length - 1)
    tokens = _write(state.tokens, proposal.tokens, state.length, jnp.full_like(state.length, proposal.tokens.shape[1]))
    lengths = state.length[:, None] + jnp.arange(block.shape[1])
    probs = laws.probabilities(logits, state.sampling, History(tokens, state.start, lengths))
    return probs, features, state._replace(cache=cache)


def judge(verify: Verify, state: State, proposal: Proposal, target_probs: Array, features: Array | None) -> State:
    """Lets the verifier decide on every row, and commits what stands."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    proposal, target_probs, sound = _sound(proposal, target_probs)
    verdict = jax.vmap(verify)(keys, proposal.tokens, proposal.probs, target_probs)
    return commit(state, proposal, verdict, sound, features)


def commit(state: State, proposal: Proposal, verdict: Verdict, sound: Array, features: Array | None) -> State:
    """Appends what stands of each proposal and the token that follows it, up to the row's end, and counts.

    ``sound`` int32 [B]: how many tokens of the block rest on finite laws; a row that needed more of them ends as NON_FINITE.
    """
    K = proposal.tokens.shape[1]
    position = jnp.arange(K + 1)
    accepted, token = verdict.num_accepted[:, None], verdict.token[:, None]
    block = jnp.where(position < accepted, jnp.concatenate([proposal.tokens, token], axis=1), token)
    origin = jnp.where(position < accepted, ACCEPTED, jnp.where(accepted < K, CORRECTION, BONUS)).astype(jnp.int8)

    stops = (block[:, :, None] == state.stop_ids).any(-1)
    until_stop = jnp.min(jnp.where(stops, position + 1, K + 1), axis=1)
    room = state.end - state.length
    wanted = jnp.minimum(jnp.minimum(verdict.num_accepted + 1, until_stop), room)
    running = state.stop_reason == RUNNING
    emitted = jnp.where(running, jnp.minimum(wanted, sound), 0)

    reason = jnp.where(emitted == room, LENGTH_LIMIT, RUNNING)
    reason = jnp.where(stops.any(1) & (emitted == until_stop), STOP_TOKEN, reason)
    reason = jnp.where(emitted < wanted, NON_FINITE, reason)
    reason = jnp.where(running, reason, state.stop_reason)
    drafted = jnp.minimum(jnp.where(reason == RUNNING, room, emitted), K)
    return state._replace(
        tokens=_write(state.tokens, block, state.length, emitted),
        origin=_write(state.origin, origin, state.length, emitted),
        length=state.length + emitted,
        stop_reason=reason,
        features=_features(state.features, features, emitted),
        counts=_count(state.counts, verdict, emitted, drafted),
    )


def _count(counts: Counts, verdict: Verdict, emitted: Array, drafted: Array) -> Counts:
    """Adds a round in which ``emitted`` tokens were appended and ``drafted`` ones lay before the row's end."""
    drafted = jnp.where(emitted > 0, drafted, 0)
    accepted = jnp.minimum(verdict.num_accepted, emitted)
    exact = accepted if verdict.num_exact is None else jnp.minimum(verdict.num_exact, accepted)
    at = jnp.arange(counts.accepted_per_position.shape[1]) < accepted[:, None]
    added = Counts((emitted > 0).astype(jnp.int32), drafted, accepted, at.astype(jnp.int32), exact)
    return jax.tree.map(jnp.add, counts, added)


def finish(state: State, capacity: int) -> Generation:
    """What was emitted, cut out of the buffers: tokens [B ``capacity``]."""
    length = state.length - state.start

    def cut(buffer: Array, start: Array, length: Array) -> Array:
        emitted = jax.lax.dynamic_slice_in_dim(buffer, start, capacity)
        return jnp.where(jnp.arange(capacity) < length, emitted, PAD)

    tokens = jax.vmap(cut)(state.tokens, state.start, length)
    origin = jax.vmap(cut)(state.origin, state.start, length)
    return Generation(tokens, length, Info(*state.counts, state.stop_reason, origin))


def _check_proposal(proposal: Proposal, draft_length: int, target_probs: Array) -> None:
    batch, _, vocab = target_probs.shape
    expected = (batch, draft_length), (batch, draft_length, vocab)
    came = proposal.tokens.shape, proposal.probs.shape
    if came != expected:
        raise ValueError(
            f"expected the draft to propose tokens and laws of shapes {expected}, as the target has them, got {came}"
        )


def _last(state: State) -> Array:
    """The last token of each row, int32 [B]."""
    return jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]


def _write(buffer: Array, block: Array, start: Array, count: Array) -> Array:
    """Writes the first ``count`` [B] of each row of ``block`` [B T] to ``buffer`` [B S] from ``start`` [B].

    As a choice in each cell: T is small, and of a scatter a TPU makes a loop.
    """
    place = jnp.arange(buffer.shape[1]) - start[:, None]
    for t in range(block.shape[1]):
        buffer = jnp.where((place == t) & (t < count[:, None]), block[:, t, None], buffer)
    return buffer


def _sound(proposal: Proposal, target_probs: Array) -> tuple[Proposal, Array, Array]:
    """Puts a uniform law in the place of those that are not finite, and says how many tokens of a block stand before the first.

    A verifier may loop until a draw succeeds, which under a law of NaN would be never.
    """
    drafted, scored = _is_law(proposal.probs), _is_law(target_probs)
    uniform = 1.0 / target_probs.shape[-1]
    draft_probs = jnp.where(drafted[:, :, None], proposal.probs, uniform)
    target_probs = jnp.where(scored[:, :, None], target_probs, uniform)
    both = scored.at[:, : drafted.shape[1]].min(drafted)
    return proposal._replace(probs=draft_probs), target_probs, jnp.cumprod(both.astype(jnp.int32), axis=1).sum(1)


def _is_law(probs: Array) -> Array:
    """False where logits were not finite, which ``sampling.probabilities`` says by NaN: bool [...] from [... V]."""
    return jnp.isfinite(probs).all(-1)


def _features(old: Array | None, new: Array | None, emitted: Array) -> Array | None:
    """The features that predicted the last emitted token; where nothing was emitted, as they were."""
    if old is None or new is None:
        return old
    last = jnp.take_along_axis(new, jnp.maximum(emitted - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(emitted[:, None] > 0, last, old)
