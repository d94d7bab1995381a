"""Which of some ways to do a thing is the quickest here: each is tried once, and from then on the quickest is taken."""

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

_KEPT = 5  # rates of each way, of which the median counts: one slow moment does not decide


class Quickest:
    """Chooses, for each batch size apart, the way that emits the most tokens a second; the order of ``ways`` breaks ties.

    >>> quickest = Quickest(["speculative", "plain"])
    >>> for way, tokens in (("speculative", 80), ("plain", 100)):
    ...     assert quickest.pick(batch=8) == way
    ...     quickest.tell(8, way, tokens, seconds=1.0)
    >>> quickest.pick(batch=8), quickest.pick(batch=1)
    ('plain', 'speculative')
    """

    def __init__(self, ways: Sequence[Hashable]):
        self.ways = tuple(ways)
        self._rates = defaultdict(lambda: deque(maxlen=_KEPT))

    def pick(self, batch: int) -> Hashable:
        """The first way not yet tried with a batch of this size, else the quickest."""
        rates = {way: self._rates[batch, way] for way in self.ways}
        untried = [way for way, some in rates.items() if not some]
        return untried[0] if untried else max(self.ways, key=lambda way: statistics.median(rates[way]))

    def tell(self, batch: int, way: Hashable, tokens: int, seconds: float) -> None:
        """Says what a way took, compiling apart."""
        self._rates[batch, way].append(tokens / max(seconds, 1e-9))
