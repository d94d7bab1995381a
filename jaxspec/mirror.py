"""The loop with the draft on devices of its own, which drafts while the target still verifies (Mirror-SD, arXiv 2510.13161).

The target's pass is cut in two around an early exit. Its lower layers guess, at each of the K + 1 places where a proposal may
end, which ``candidates`` tokens may follow; while its upper layers verify, the draft rolls a next proposal out from each of these
(K + 1) x candidates branches. If the token that the target then emits is among the candidates of the place where the proposal
ended, that branch is the next proposal; otherwise the draft proposes anew. A round takes

    T_lower + max(T_upper, T_branches) + (1 - reused) T_propose + the transfers

instead of T_lower + T_upper + T_propose. The host only dispatches; programs on two meshes run at the same time.

Invariant. Branches change no token: the loop emits what ``speculate.generate`` does. The draft draws with a key that is made of
the row's key and the position where the proposal begins (``rounds.propose``), in a branch as anew; so a branch is the very
proposal that the draft would make after the same tokens, and its probs are what its tokens were drawn from. Which branches there
are depends on the exit, and which one is taken on the verdict; neither enters a branch's draws, whose stream is not the
verifier's. So what holds of a rule without branches holds with them (up to rounding, which may depend on the rows of a batch).
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec import checks, mesh, rounds, speculate
from jaxspec import request as requests
from jaxspec.request import Request, StopIds
from jaxspec.sampling import Sampling
from jaxspec.state import RUNNING, Generation, State
from jaxspec.types import Array, Draft, DraftState, LanguageModel, Params, Proposal, Split, Verify

CANDIDATES = 4  # kappa, where none is given
NO_MODEL = "expected a draft that is a model of its own for --mirror, got {}: make one with `jaxspec convert --layers`"
_DEFAULT = Sampling()


class Mirror(NamedTuple):
    """A target and a draft on devices of their own.

    Attributes:
        split: the target, with its early exit.
        draft: that reads tokens only, K of 1 or more.
        candidates: kappa, how many tokens the exit guesses at each place.
        target_mesh: where the target is.
        draft_mesh: where the draft is, without a device of the target's.
    """

    split: Split
    draft: Draft
    candidates: int
    target_mesh: Mesh
    draft_mesh: Mesh


class Mirrored(NamedTuple):
    """What ``generate`` gives: the tokens, how many rounds the batch took, and how many of these began with a branch."""

    generation: Generation
    rounds: int
    reused: int


class Options(NamedTuple):
    """What a person asks for: devices for the draft, kappa, and the layers before the exit; None: half of them."""

    devices: int
    candidates: int = CANDIDATES
    exit_layer: int | None = None


def parse(text: str) -> Options:
    """The options from "draft=N", perhaps with ",candidates=C" and ",exit=L" after it.

    Raises:
        ValueError: the text is something else.

    >>> parse("draft=1,candidates=8")
    Options(devices=1, candidates=8, exit_layer=None)
    """
    parts = [re.fullmatch(r"(draft|candidates|exit)=([1-9]\d*)", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if "draft" not in sizes or len(sizes) < len(parts):
        raise ValueError(
            f"expected draft=N for N devices, with candidates=C and exit=L if need be, got {text!r}: write draft=1,candidates=4"
        )
    return Options(sizes["draft"], sizes.get("candidates", CANDIDATES), sizes.get("exit"))


def meshes(devices: int, shape: tuple[int, int] = (1, 1), among: Sequence[Any] | None = None) -> tuple[Mesh, Mesh]:
    """The mesh of the target, of the first devices, and that of the draft, of the last.

    Args:
        devices: of the draft, which divide its weights.
        shape: of the target's mesh, parts of the batch and of the weights.
        among: by default all of JAX's devices.

    Raises:
        ValueError: there are fewer devices.
    """
    among = list(jax.devices() if among is None else among)
    needed = shape[0] * shape[1] + devices
    if needed > len(among):
        raise ValueError(
            f"expected at most {len(among)} devices, which there are, for the target and the draft, got {needed}: choose fewer "
            "(on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of them)"
        )
    return mesh.make(*shape, among[:-devices]), mesh.make(1, devices, among[-devices:])


def generate(
    key: Array,
    mirror: Mirror,
    target_params: Params,
    draft_params: Params,
    verify: Verify,
    prompt: Any,
    prompt_length: Any,
    *,
    max_new_tokens: int,
    limit: Any = None,
    stop_ids: StopIds = (),
    sampling: Sampling | Sequence[Sampling] = _DEFAULT,
) -> Mirrored:
    """Speculative generation with the draft on devices of its own: the tokens of ``speculate.generate``, whose Args these are.

    Args:
        key: one key or keys [B].
        mirror: target and draft.
        target_params: the target's, on its devices, see ``place``.
        draft_params: the draft's, on its devices.
        verify: the rule of acceptance.
        prompt: int32 [B P].
        prompt_length: int32 [B].
        max_new_tokens: N.
        limit: the most tokens that a row may emit.
        stop_ids: that end a row.
        sampling: how every row is sampled.

    Raises:
        ValueError: an argument has the wrong shape, type or range, or the draft is no model of its own.
    """
    target = mirror.split.model
    request = speculate.check_request(
        key, target, target_params, prompt, prompt_length, max_new_tokens, limit, stop_ids, sampling
    )
    return generate_request(mirror, max_new_tokens, target_params, draft_params, verify, request)


def place(params: Params, where: Mesh) -> Params:
    """Arrays on the devices of a mesh: those that are there already as they are, others whole on each of its devices."""
    devices, whole = set(where.devices.flat), NamedSharding(where, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices else jax.device_put(leaf, whole),
        params,
    )


def generate_request(
    mirror: Mirror, capacity: int, target_params: Params, draft_params: Params, verify: Verify, request: Request
) -> Mirrored:
    """The loop of ``generate``: a checked request with room for ``capacity`` emitted tokens in each row."""
    split, draft, candidates, there, here = mirror
    _check(mirror, draft_params)
    verify, asked = place(speculate.as_pytree(verify), there), request.prompt.shape[0]
    cells = request.prompt.shape[1] + capacity + draft.length + 1
    with jax.set_mesh(there):
        state = start(split.model, draft.length, cells, target_params, send(request, there))
    side = send(state._replace(cache=()), here)
    with jax.set_mesh(here):
        proposal, side = begin(draft, request.prompt.shape[1], draft_params, side)
    total, reused, running = 0, [], bool((request.limit > 0).any())
    while running:
        sent = send(proposal, there)
        with jax.set_mesh(there):
            hidden, guesses, state = score_lower(split, candidates, target_params, sent, state)
            received = send(guesses, here)
            outcome, state = score_upper(split, target_params, verify, hidden, sent, state)
        with jax.set_mesh(here):
            branches = roll_out(draft, draft_params, side, proposal.tokens, received)
            again, proposal, side = follow(draft, draft_params, side, proposal.tokens, received, branches, send(outcome, here))
        total, reused = total + 1, [*reused, again]
        running = bool(jax.device_get(outcome)[_GOES_ON].any())  # while the draft's devices go on
    with jax.set_mesh(there):
        generation = speculate.first_rows(speculate.finish(state, capacity), asked)
    return Mirrored(generation, total, sum(map(bool, jax.device_get(reused))))


_GOES_ON = 2  # the row of an outcome


def _check(mirror: Mirror, draft_params: Params) -> None:
    """Refuses what cannot run."""
    vocab = mirror.split.model.vocab
    if set(mirror.target_mesh.devices.flat) & set(mirror.draft_mesh.devices.flat):
        raise ValueError("expected a draft on devices of its own, got devices of the target: choose others, see mirror.meshes")
    if mirror.draft.length < 1 or not jax.tree.leaves(draft_params):
        raise ValueError(NO_MODEL.format("one without weights or with a draft length of 0"))
    if mirror.candidates < 1 or (vocab is not None and mirror.candidates > vocab):
        raise ValueError(f"expected 1 to {vocab} candidates, got {mirror.candidates}: choose a few, such as {CANDIDATES}")


def send(tree: Any, where: Mesh) -> Any:
    """An asynchronous copy, whole on every device of a mesh."""
    return jax.device_put(tree, NamedSharding(where, PartitionSpec()))


# --- The target's devices ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(target: LanguageModel, draft_length: int, cells: int, params: Params, request: Request) -> State:
    """The target's state before the first round."""
    request = requests.filled_up(request, mesh.parts("batch"))
    state, features = speculate.prefill(target, params, requests.complete(request), cells, draft_length)
    if features is not None:
        raise ValueError(NO_MODEL.format("one that reads the target's features"))
    return speculate.with_own_arrays(state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def score_lower(split: Split, candidates: int, params: Params, proposal: Proposal, state: State) -> tuple[Array, Array, State]:
    """The target's lower layers: what the upper ones continue from, and the candidates at each place, int32 [B K+1 kappa].

    The token after a place is a correction, which is another token than the drafted one, but for the bonus token after the last.
    """
    block = rounds.block_of(state, proposal)
    hidden, logits, cache = split.lower(params, block, state.cache, state.length - 1)
    drafted = jnp.pad(proposal.tokens, ((0, 0), (0, 1)), constant_values=-1)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    logits = jnp.where(ids[None, None] == drafted[:, :, None], -jnp.inf, mesh.constrain(logits, "batch"))
    return hidden, jax.lax.top_k(logits, candidates)[1].astype(jnp.int32), state._replace(cache=cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def score_upper(
    split: Split, params: Params, verify: Verify, hidden: Array, proposal: Proposal, state: State
) -> tuple[Array, State]:
    """The upper layers, verification and commit: the outcome of the round, int32 [3 B], and the state.

    The outcome is, for each row, its length, its last token, and whether it goes on.
    """

    def apply(params: Params, tokens: Array, cache: Any, length: Array) -> tuple[Array, None, Any]:
        logits, cache = split.upper(params, hidden, cache, length)
        return logits, None, cache

    target_probs, features, state = rounds.score(split.model._replace(apply=apply), params, proposal, state)
    checks.check_proposal(proposal, proposal.tokens.shape[1], target_probs)
    state = rounds.verify_and_commit(verify, state, proposal, target_probs, features)
    return jnp.stack([state.length, rounds.last_token(state), (state.stop_reason == RUNNING).astype(jnp.int32)]), state


# --- The draft's devices ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(draft: Draft, width: int, params: Params, side: State) -> tuple[Proposal, State]:
    """The first proposal after prompts of ``width`` tokens.

    ``side`` is the state as the draft's devices know it: without the target's cache, and of rows that finished, out of date.
    """
    prompt, cells = side.tokens[:, :width], side.tokens.shape[1]
    side = side._replace(draft=draft.init(params, prompt, side.start, cells, None))
    proposal, side = rounds.propose(draft, params, side)
    return proposal, speculate.with_own_arrays(side)


@functools.partial(jax.jit, static_argnums=0)
def roll_out(draft: Draft, params: Params, side: State, drafted: Array, guesses: Array) -> tuple[Proposal, DraftState]:
    """A proposal after each guess, [B * K+1 * kappa K], and the draft's states after them.

    Branches past the end of a row write to the last cells of their own copies: such a row does not go on.
    """
    batch, places, candidates = guesses.shape
    owner = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), places * candidates)
    tokens = rounds.write(side.tokens, drafted, side.length, jnp.full_like(side.length, places - 1))
    branch = jax.tree.map(lambda rows: rows[owner], side._replace(tokens=tokens))
    place = jnp.tile(jnp.repeat(jnp.arange(places, dtype=jnp.int32), candidates), batch)
    one = jnp.ones_like(place)
    tokens = rounds.write(branch.tokens, guesses.reshape(-1, 1), branch.length + place, one)
    proposal, branch = rounds.propose(draft, params, branch._replace(tokens=tokens, length=branch.length + place + one))
    return proposal, branch.draft


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def follow(
    draft: Draft,
    params: Params,
    side: State,
    drafted: Array,
    guesses: Array,
    branches: tuple[Proposal, DraftState],
    outcome: Array,
) -> tuple[Array, Proposal, State]:
    """Whether each row that goes on has a branch for what it emitted, and the next proposal: its branch, or anew for all rows."""
    batch, places, candidates = guesses.shape
    length, last, goes_on = outcome[0], outcome[1], outcome[_GOES_ON] > 0
    place = jnp.clip(length - side.length - 1, 0, places - 1)
    found = jnp.take_along_axis(guesses, place[:, None, None], axis=1)[:, 0] == last[:, None]
    branch = (jnp.arange(batch, dtype=jnp.int32) * places + place) * candidates + jnp.argmax(found, axis=1).astype(jnp.int32)
    tokens = rounds.write(side.tokens, drafted, side.length, place)
    tokens = rounds.write(tokens, last[:, None], length - 1, goes_on.astype(jnp.int32))
    side = side._replace(tokens=tokens, length=jnp.where(goes_on, length, side.length))
    reused = goes_on.any() & (found.any(1) | ~goes_on).all()

    def take() -> tuple[Proposal, State]:
        proposal, state = jax.tree.map(lambda rows: rows[branch], branches)
        return proposal, side._replace(draft=state)

    def anew() -> tuple[Proposal, State]:
        return rounds.propose(draft, params, side)

    proposal, side = jax.lax.cond(reused, take, anew)
    return reused, proposal, side
