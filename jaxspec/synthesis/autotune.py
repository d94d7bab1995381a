"""Chooses the fastest of some candidates on this machine: each is tried once, and from then on the fastest is used."""

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from jaxspec.common import hosts

T = TypeVar("T", bound=Hashable)

_KEPT = 5  # rates of each candidate; their median counts, so that one slow moment does not decide


class Autotuner(Generic[T]):
    """Chooses, for each batch size, the candidate that emits the most tokens per second; their order breaks ties.

    >>> autotuner = Autotuner(["plain", "speculative"])
    >>> for candidate, tokens in (("plain", 80), ("speculative", 100)):
    ...     assert autotuner.choose(batch=8) == candidate
    ...     autotuner.record(8, candidate, tokens, seconds=1.0)
    >>> autotuner.choose(batch=8), autotuner.choose(batch=1)
    ('speculative', 'plain')
    """

    def __init__(self, candidates: Sequence[T]):
        self.candidates = tuple(candidates)
        self._rates: dict[tuple[int, T], deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def choose(self, batch: int) -> T:
        """The first candidate not yet tried with a batch of this size, else the fastest; of several hosts the first chooses."""
        rates = {candidate: self._rates[batch, candidate] for candidate in self.candidates}
        untried = [candidate for candidate, some in rates.items() if not some]
        best = untried[0] if untried else max(self.candidates, key=lambda candidate: statistics.median(rates[candidate]))
        return self.candidates[hosts.from_first(lambda: self.candidates.index(best))]

    def record(self, batch: int, candidate: T, tokens: int, seconds: float) -> None:
        """Records what a candidate took, compilation excluded."""
        self._rates[batch, candidate].append(tokens / max(seconds, 1e-9))
