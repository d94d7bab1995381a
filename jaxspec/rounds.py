"""One round of the loop: propose -> score -> verify_and_commit; and the plain step without a draft."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32
from jaxtyping import Key as KeyArray

from jaxspec import checks
from jaxspec import sampling as sampling_lib
from jaxspec.state import (
    ACCEPTED,
    BONUS,
    CORRECTION,
    INVALID_VERDICT,
    LENGTH_LIMIT,
    NON_FINITE,
    RUNNING,
    STOP_TOKEN,
    Counts,
    State,
)
from jaxspec.types import Array, Context, Draft, History, LanguageModel, Params, Proposal, Verdict, Verify

_DRAFT_STREAM = 2**31 - 1  # beyond every position, so that the draft's keys and the verifier's never meet


def step(target: LanguageModel, target_params: Params, draft: Draft, draft_params: Params, verify: Verify, state: State) -> State:
    """One round for every row; finished rows take part in the computation and are left unchanged."""
    proposal, state = propose(draft, draft_params, state)
    target_probs, features, state = score(target, target_params, proposal, state)
    checks.check_proposal(proposal, draft.length, target_probs)
    return verify_and_commit(verify, state, proposal, target_probs, features)


def plain_step(target: LanguageModel, target_params: Params, state: State) -> State:
    """One token for every row without a draft, for a state whose draft length is 0."""
    logits, features, cache = target.apply(target_params, last_token(state)[:, None], state.cache, state.length - 1)
    probs = sampling_lib.probabilities(logits, state.sampling, History(state.tokens, state.start, state.length))
    token = jax.vmap(sampling_lib.sample)(_fold(state.keys, state.length), probs[:, 0])
    nothing = Proposal(jnp.zeros((token.shape[0], 0), jnp.int32), probs[:, :0])
    num_finite = _is_finite(probs)[:, 0].astype(jnp.int32)
    return commit(state._replace(cache=cache), nothing, Verdict(jnp.zeros_like(token), token), num_finite, features)


def propose(draft: Draft, params: Params, state: State) -> tuple[Proposal, State]:
    """The draft's K tokens and their distributions."""
    keys = _fold(_fold(state.keys, jnp.full_like(state.length, _DRAFT_STREAM)), state.length)
    context = Context(state.tokens, state.start, state.length, last_token(state), state.features, state.num_fresh, state.sampling)
    proposal, draft_state = draft.propose(params, keys, context, state.draft)
    return proposal, state._replace(draft=draft_state)


def score(
    target: LanguageModel, params: Params, proposal: Proposal, state: State
) -> tuple[Float32[Array, "B T V"], Float[Array, "B T F"] | None, State]:
    """The target's distributions float32 [B K+1 V] after the last token and each drafted one, and its features [B K+1 F].

    Each distribution has the tokens drafted before it in its history, as if they had been emitted.
    """
    block = block_of(state, proposal)
    logits, features, cache = target.apply(params, block, state.cache, state.length - 1)
    tokens = write(state.tokens, proposal.tokens, state.length, jnp.full_like(state.length, proposal.tokens.shape[1]))
    lengths = state.length[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)[None]
    probs = sampling_lib.probabilities(logits, state.sampling, History(tokens, state.start, lengths))
    return probs, features, state._replace(cache=cache)


def verify_and_commit(
    verify: Verify,
    state: State,
    proposal: Proposal,
    target_probs: Float32[Array, "B T V"],
    features: Float[Array, "B T F"] | None,
) -> State:
    """Applies the rule of acceptance to every row, and commits the result."""
    proposal, target_probs, num_finite = _mask_non_finite(proposal, target_probs)
    verdict = jax.vmap(verify)(_fold(state.keys, state.length), proposal.tokens, proposal.probs, target_probs)
    verdict, valid = checks.check_verdict(verdict, proposal, target_probs.shape[-1])
    after = commit(state, proposal, verdict, jnp.where(valid, num_finite, 0), features)
    invalid = (state.stop_reason == RUNNING) & ~valid
    return after._replace(stop_reason=jnp.where(invalid, INVALID_VERDICT, after.stop_reason))


def commit(
    state: State,
    proposal: Proposal,
    verdict: Verdict,
    num_finite: Int32[Array, " B"],
    features: Float[Array, "B T F"] | None,
) -> State:
    """Appends the accepted tokens and the one that follows them, up to the end of the row, and counts.

    Args:
        state: before.
        proposal: the drafted tokens [B K].
        verdict: num_accepted and token, each [B].
        num_finite: int32 [B], how many tokens of the block rest on finite distributions; a row that needs more of them ends as
            NON_FINITE.
        features: the target's, [B K+1 F], of the positions from the last token on.
    """
    K = proposal.tokens.shape[1]
    position = jnp.arange(K + 1, dtype=jnp.int32)[None]
    accepted, token = verdict.num_accepted[:, None], verdict.token[:, None]
    block = jnp.where(position < accepted, jnp.concatenate([proposal.tokens, token], axis=1), token)
    origin = jnp.where(position < accepted, ACCEPTED, jnp.where(accepted < K, CORRECTION, BONUS)).astype(jnp.int8)

    stops = (block[:, :, None] == state.stop_ids[:, None]).any(-1)
    until_stop = jnp.min(jnp.where(stops, position + 1, K + 1), axis=1)
    room = state.end - state.length
    wanted = jnp.minimum(jnp.minimum(verdict.num_accepted + 1, until_stop), room)
    running = state.stop_reason == RUNNING
    count = jnp.where(running, jnp.minimum(wanted, num_finite), 0)

    reason = jnp.where(count == room, LENGTH_LIMIT, RUNNING)
    reason = jnp.where(stops.any(1) & (count == until_stop), STOP_TOKEN, reason)
    reason = jnp.where(count < wanted, NON_FINITE, reason)
    reason = jnp.where(running, reason, state.stop_reason)
    drafted = jnp.minimum(jnp.where(reason == RUNNING, room, count), K)
    return state._replace(
        tokens=write(state.tokens, block, state.length, count),
        origin=write(state.origin, origin, state.length, count),
        length=state.length + count,
        stop_reason=reason,
        features=_newer(count > 0, features, state.features),
        num_fresh=jnp.where(count > 0, count, state.num_fresh),
        counts=_count(state.counts, verdict, count, drafted),
    )


def _newer(changed: Bool[Array, " B"], new: Array | None, old: Array | None) -> Array | None:
    """The new features of the rows that changed; None where the target computes none."""
    return None if new is None or old is None else jnp.where(changed[:, None, None], new, old)


def _count(counts: Counts, verdict: Verdict, emitted: Int32[Array, " B"], drafted: Int32[Array, " B"]) -> Counts:
    """Adds a round that appended ``emitted`` tokens and drafted ``drafted`` before the row's end."""
    drafted = jnp.where(emitted > 0, drafted, 0)
    accepted = jnp.minimum(verdict.num_accepted, emitted)
    exact = accepted if verdict.num_exact is None else jnp.minimum(verdict.num_exact, accepted)
    at = jnp.arange(counts.accepted_per_position.shape[1], dtype=jnp.int32)[None] < accepted[:, None]
    added = Counts((emitted > 0).astype(jnp.int32), drafted, accepted, at.astype(jnp.int32), exact)
    return jax.tree.map(jnp.add, counts, added)


def _mask_non_finite(
    proposal: Proposal, target_probs: Float32[Array, "B T V"]
) -> tuple[Proposal, Float32[Array, "B T V"], Int32[Array, " B"]]:
    """Replaces distributions that are not finite by uniform ones, and counts the leading tokens of each block that are finite.

    A verifier may loop until a draw succeeds, which it never does under NaN.
    """
    drafted, scored = _is_finite(proposal.probs), _is_finite(target_probs)
    uniform = 1.0 / target_probs.shape[-1]
    draft_probs = jnp.where(drafted[:, :, None], proposal.probs, uniform)
    target_probs = jnp.where(scored[:, :, None], target_probs, uniform)
    both = scored.at[:, : drafted.shape[1]].min(drafted)
    return proposal._replace(probs=draft_probs), target_probs, jnp.cumprod(both.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)


def _is_finite(probs: Float[Array, "*rows V"]) -> Bool[Array, "*rows"]:
    """False where logits were not finite, which ``sampling.probabilities`` marks by NaN: bool [...] from [... V]."""
    return jnp.isfinite(probs).all(-1)


def _fold(keys: KeyArray[Array, " B"], data: Int32[Array, " B"]) -> KeyArray[Array, " B"]:
    """fold_in for each row: keys [B], data int32 [B]."""
    return jax.vmap(jax.random.fold_in)(keys, data)


def block_of(state: State, proposal: Proposal) -> Int32[Array, "B T"]:
    """What the target scores: the last token of each row and the drafted ones, int32 [B K+1]."""
    return jnp.concatenate([last_token(state)[:, None], proposal.tokens], axis=1)


def last_token(state: State) -> Int32[Array, " B"]:
    """The last token of each row, int32 [B]."""
    return jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]


def write(
    buffer: Int[Array, "B S"], block: Int[Array, "B T"], start: Int32[Array, " B"], count: Int32[Array, " B"]
) -> Int[Array, "B S"]:
    """Writes the first ``count`` [B] of each row of ``block`` [B T] to ``buffer`` [B S] from ``start`` [B].

    As a select in each cell: T is small, and XLA for TPU makes a slow loop of a scatter.
    """
    place = jnp.arange(buffer.shape[1], dtype=jnp.int32)[None] - start[:, None]
    for t in range(block.shape[1]):
        buffer = jnp.where((place == t) & (t < count[:, None]), block[:, t, None], buffer)
    return buffer
