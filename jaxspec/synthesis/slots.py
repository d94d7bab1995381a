"""Rows of a running loop as slots, kept by the host: a piece of text enters, rounds run, and what it emitted is read.

The host may stay one call behind the device: ``advance`` returns at once, and ``read`` waits for the oldest call not yet read.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxspec import request, speculate
from jaxspec.common.compilation_cache import describe, updating
from jaxspec.state import LENGTH_LIMIT, RUNNING, Counts, Emitted, Generation, Info, State
from jaxspec.synthesis.contract import Requests, Synthesizer
from jaxspec.synthesis.decoding import Decoding
from jaxspec.types import Array, Draft, LanguageModel, Params, Verify


@dataclasses.dataclass(eq=False)
class Row:
    """What the host knows of a row: all that it has emitted, how much of it came last, and, once it has finished, why."""

    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    origin: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int8))
    num_new: int = 0
    stop_reason: int = RUNNING
    counts: Counts | None = None  # of arrays without a batch axis

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.stop_reason == RUNNING

    def generation(self) -> Generation:
        """The row as a generation of one row, on the host."""
        assert self.counts is not None
        info = Info(*(np.asarray(count)[None] for count in (*self.counts, self.stop_reason, self.origin)))  # pyright: ignore
        return Generation(self.tokens[None], np.array([len(self.tokens)]), info)  # pyright: ignore


class Slots:
    """A number of slots, each empty or with a row.

    Args:
        synthesizer: whose target and drafter.
        decoding: the draft and the verifier of all rows.
        count: B, the number of slots.
        cells: S, what a row's prompt and tokens fit into, with K + 1 to spare.
        num_stops: how many stop ids a request has.
        sizes: a call computes as many rows as the smallest of these that holds those in use; ``count`` is always one.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        decoding: Decoding,
        count: int,
        cells: int,
        num_stops: int,
        sizes: Sequence[int] = (),
    ):
        draft_params = synthesizer.drafter.params if synthesizer.drafter and decoding.draft else None
        self._models = synthesizer.target, synthesizer.target_params, decoding.draft, draft_params
        self._verify = decoding.verify and speculate.as_pytree(decoding.verify) if decoding.draft else None
        self._programs: dict[Hashable, Callable[..., State]] = {}  # by function and shapes
        self._state = _empty(*self._models, count, cells, num_stops)
        self._flying: collections.deque[tuple[Emitted, np.ndarray, list[Row | None]]] = collections.deque()
        self.rows: list[Row | None] = [None] * count
        self.sizes = sorted({*sizes, count})

    def admit(self, one: request.Request) -> Row:
        """Puts a request of one row into an empty slot; there must be one."""
        slot, row = self.rows.index(None), Row()
        speculate.check_admission(self._models[2], self._state, one)
        self._update(_admit, np.int32(slot), one)
        self.rows[slot] = row
        return row

    def release(self, row: Row) -> None:
        """Empties the slot of a row that is given up; a row that has left already is none."""
        if row in self.rows:
            self.rows[self.rows.index(row)] = None

    def advance(self, rounds: int, size: int | None = None) -> int:
        """Starts at most so many rounds of all rows, and the copy of what they emit.

        Args:
            rounds: 1 or more.
            size: one of ``sizes`` in place of the smallest that will do.

        Returns:
            The number of rows that are computed.
        """
        used = [slot for slot, row in enumerate(self.rows) if row]
        size = size or next(size for size in self.sizes if size >= len(used))
        spare = [slot for slot, row in enumerate(self.rows) if not row]
        index = None if size == len(self.rows) else np.array((used + spare)[:size], np.int32)
        self._update(_advance, self._verify, index, np.int32(rounds))
        since = np.array([len(row.tokens) if row else 0 for row in self.rows], np.int32)
        news = speculate.emitted(self._state, since)
        for array in jax.tree.leaves(news):
            array.copy_to_host_async()
        self._flying.append((news, since, list(self.rows)))
        return size

    def _update(self, function: Callable[..., State], *arguments: Any) -> None:
        """Sets the state to ``function(target, draft, state, target_params, draft_params, *arguments)``."""
        target, target_params, draft, draft_params = self._models
        leaves, structure = jax.tree.flatten(arguments)
        key = function, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        given = self._state, target_params, draft_params, *arguments
        if key not in self._programs:
            self._programs[key] = updating(function, (target, draft), *given)
        self._state = self._programs[key](*given)

    @property
    def unread(self) -> int:
        """How many calls of ``advance`` were not read."""
        return len(self._flying)

    def read(self) -> Iterator[Row]:
        """Waits for the oldest call of ``advance`` that was not read, and gives its rows; finished ones have left their slots."""
        news, since, rows = self._flying.popleft()
        news = jax.device_get(news)
        for slot, row in enumerate(rows):
            if row is None or self.rows[slot] is not row:  # it was given up, or had finished one call earlier
                continue
            new = slice(len(row.tokens) - since[slot], news.length[slot])
            row.num_new = int(new.stop - new.start)
            row.tokens = np.concatenate([row.tokens, news.tokens[slot, new]])
            row.origin = np.concatenate([row.origin, news.origin[slot, new]])
            row.stop_reason = int(news.stop_reason[slot])
            row.counts = jax.tree.map(lambda count, slot=slot: count[slot], news.counts)
            if not row.running:
                self.rows[slot] = None
            yield row


def row_request(synthesizer: Synthesizer, requests: Requests, row: int, keys: Array, width: int | None = None) -> request.Request:
    """One row of some requests, for ``Slots.admit``.

    Args:
        synthesizer: whose requests they are.
        requests: of some pieces of text.
        row: which one.
        keys: [1], its key.
        width: to which its prompt is cut or padded; by default that of the requests.
    """
    one, kept = slice(row, row + 1), requests.prompt[row : row + 1, :width]
    prompt = np.pad(kept, ((0, 0), (0, 0 if width is None else width - kept.shape[1])))
    sampled = requests.sampling[row] if isinstance(requests.sampling, list) else requests.sampling
    return speculate.check_request(
        keys,
        synthesizer.target,
        synthesizer.target_params,
        prompt,
        requests.prompt_length[one],
        requests.max_new_tokens,
        requests.limit[one],
        requests.stop_ids,
        sampled,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _advance(
    target: LanguageModel,
    draft: Draft | None,
    state: State,
    target_params: Params,
    draft_params: Params,
    verify: Verify | None,
    index: Array | None,
    num_rounds: Array,
) -> State:
    """``speculate.advance`` of the rows ``index`` int32 [n], all different, or of all, of a state that is donated."""
    some = state if index is None else jax.tree.map(lambda rows: rows[index], state)
    some = speculate.advance(target, target_params, draft, draft_params, verify, some, num_rounds)
    return some if index is None else jax.tree.map(lambda rows, new: rows.at[index].set(new, unique_indices=True), state, some)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _admit(
    target: LanguageModel,
    draft: Draft | None,
    state: State,
    target_params: Params,
    draft_params: Params,
    slot: Array,
    one: request.Request,
) -> State:
    """``speculate.admit`` of a checked request, to a state that is donated."""
    return speculate.admit_request(target, target_params, draft, draft_params, state, slot, one)


describe(_advance, "advances slots")
describe(_admit, "admits to a slot")


def _empty(
    target: LanguageModel,
    target_params: Params,
    draft: Draft | None,
    draft_params: Params,
    count: int,
    cells: int,
    num_stops: int,
) -> State:
    """A state whose rows have all finished, of zeros, so that nothing is compiled for it."""
    idle = request.check(
        jax.random.wrap_key_data(jax.device_put(np.zeros((count, 2), np.uint32)), impl="threefry2x32"),
        np.zeros((count, 1), np.int32),
        np.ones(count, np.int32),
        max_new_tokens=1,
        limit=0,
        stop_ids=[[0] * num_stops] * count,
    )
    shapes = jax.eval_shape(
        lambda params, idle: speculate.init(target, params[0], draft, params[1], idle, cells), (target_params, draft_params), idle
    )
    zeros: Any = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes._replace(keys=None, sampling=None))
    ones, finished = np.ones(count, np.int32), np.full(count, LENGTH_LIMIT, np.int32)
    state = jax.device_put(zeros._replace(start=ones, length=ones.copy(), end=ones.copy(), stop_reason=finished))
    return state._replace(keys=idle.keys, sampling=idle.sampling)
