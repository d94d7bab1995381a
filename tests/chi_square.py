"""Chi-square test of drawn tokens against a distribution, for every test file that needs it."""

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-4  # the rate at which a correct sampler would fail one test, if the seeds were fresh


def assert_distribution(tokens, probs):
    """Asserts that tokens are drawn from ``probs`` [V], with a false-alarm rate of ``FALSE_ALARM``.

    Tokens of probability 0 must not occur; rare ones are pooled into cells of 5 or more expected.
    """
    probs = np.asarray(probs, np.float64)
    seen = np.bincount(np.ravel(tokens), minlength=len(probs))
    assert seen[probs == 0].sum() == 0
    cells = [[0, 0.0]]
    for token in np.argsort(-probs):
        if cells[-1][1] >= 5:
            cells.append([0, 0.0])
        cells[-1][0] += seen[token]
        cells[-1][1] += probs[token] / probs.sum() * seen.sum()
    if len(cells) > 1 and cells[-1][1] < 5:
        last = cells.pop()
        cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    seen, expected = np.transpose(cells)
    assert len(cells) == 1 or stats.chisquare(seen, expected).pvalue > FALSE_ALARM
