"""Chi-square of drawn tokens against a law, for every test file that needs it."""

import numpy as np
from scipy import stats

FALSE_ALARM = 1e-4  # how often a test with a fresh seed would fail though nothing is wrong


def assert_law(tokens, law):
    """Tokens of a law [V], none of probability 0; rare ones are counted together, in cells of 5 or more expected."""
    law = np.asarray(law, np.float64)
    seen = np.bincount(np.ravel(tokens), minlength=len(law))
    assert seen[law == 0].sum() == 0
    cells = [[0, 0.0]]
    for token in np.argsort(-law):
        if cells[-1][1] >= 5:
            cells.append([0, 0.0])
        cells[-1][0] += seen[token]
        cells[-1][1] += law[token] / law.sum() * seen.sum()
    if len(cells) > 1 and cells[-1][1] < 5:
        last = cells.pop()
        cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    seen, expected = np.transpose(cells)
    assert len(cells) == 1 or stats.chisquare(seen, expected).pvalue > FALSE_ALARM
