"""Which of some ways to do a thing is the quickest here: each is tried once, and from then on the quickest is taken."""

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

_KEPT = 5  # rates of each way, of which the median counts: one slow moment does not decide


class Autotuner:
    """Chooses, for each batch size apart, the way that emits the most tokens a second; the order of ``candidates`` breaks ties.

    >>> quickest = Autotuner(["speculative", "plain"])
    >>> for way, tokens in (("speculative", 80), ("plain", 100)):
    ...     assert quickest.pick(batch=8) == way
    ...     quickest.tell(8, way, tokens, seconds=1.0)
    >>> quickest.pick(batch=8), quickest.pick(batch=1)
    ('plain', 'speculative')
    """

    def __init__(self, candidates: Sequence[Hashable]):
        self.candidates = tuple(candidates)
        self._rates = defaultdict(lambda: deque(maxlen=_KEPT))

    def choose(self, batch: int) -> Hashable:
        """The first way not yet tried with a batch of this size, else the quickest."""
        rates = {candidate: self._rates[batch, candidate] for candidate in self.candidates}
        untried = [candidate for candidate, some in rates.items() if not some]
        return untried[0] if untried else max(self.candidates, key=lambda candidate: statistics.median(rates[candidate]))

    def record(self, batch: int, candidate: Hashable, tokens: int, seconds: float) -> None:
        """Says what a way took, compiling apart."""
        self._rates[batch, candidate].append(tokens / max(seconds, 1e-9))
