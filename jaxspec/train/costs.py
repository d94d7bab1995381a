"""Seconds of a plain step and of rounds with a draft, by the library's own programs, to predict the speed-up in training."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import request as requests_lib
from jaxspec import rounds, speculate
from jaxspec.draft import ngram_draft
from jaxspec.state import State
from jaxspec.synthesis.contract import Drafter, Requests, target_of
from jaxspec.train.speech import Target
from jaxspec.verify.exact import exact

_REPEATS = 12


class Costs(NamedTuple):
    """Seconds of one plain step at batch 1, and of one round for K = 1, 2 ..., those between measured ones interpolated."""

    plain_s: float
    round_s: list[float]

    def speed_up(self, tokens: np.ndarray) -> np.ndarray:
        """The speed-up over the plain loop for the tokens of a round for K = 1, 2 ..."""
        return tokens * self.plain_s / np.array(self.round_s)


def measure(target: Target, drafter: Drafter, requests: Requests, longest: int) -> Costs:
    """Times single steps of both loops; the weights of the draft may be untrained.

    Args:
        target: the model.
        drafter: for it.
        requests: of one row.
        longest: the largest K; 1, half of it and itself are measured.
    """
    shape = target.pretrained.model.shape
    lm, without = target_of(shape, drafter), target_of(shape, None)  # the plain loop computes no features
    params, asked = target.pretrained.params, requests_lib.check(jax.random.key(0), **requests._asdict())
    cells = requests.prompt.shape[1] + requests.max_new_tokens + longest + 1

    plain = jax.jit(rounds.plain_step, static_argnums=0, donate_argnums=2)
    state = speculate.init(without, params, ngram_draft(0, shape.vocab), (), asked, cells)
    plain_s = _median(lambda state: plain(without, params, state), state)
    round_ = jax.jit(rounds.step, static_argnums=(0, 2), donate_argnums=5)
    lengths = sorted({1, -(-longest // 2), longest})
    seconds = []
    for draft in map(drafter.make, lengths):
        rule = speculate.as_pytree(exact())
        step = lambda state, draft=draft, rule=rule: round_(lm, params, draft, drafter.params, rule, state)  # noqa: E731
        seconds.append(_median(step, speculate.init(lm, params, draft, drafter.params, asked, cells)))
    return Costs(plain_s, np.interp(np.arange(1, longest + 1), lengths, seconds).tolist())


def _median(step: Callable[[State], State], state: State) -> float:
    state, times = jax.block_until_ready(step(state)), []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def named(tokens: Sequence[float]) -> str:
    """The values for K = 1, 2 ... in a line.

    >>> named([1.5, 1.75])
    'K=1 1.50, K=2 1.75'
    """
    return ", ".join(f"K={k} {value:.2f}" for k, value in enumerate(tokens, 1))
