"""Alignment of the phones of a recording with the symbols of its text, by dynamic programming.

flite reports the phones and their times; the model reads phones from a dictionary, or letters. The alignment is monotone: each
phone has one symbol, several phones may share a symbol (the letter x), and symbols may have no phone (spaces, silent letters).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

_VOWELS = frozenset("aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw".split())
_PUNCTUATION = "<> ,.?!"


@cache
def _match_cost(phone: str, symbol: str) -> float:
    """The cost of aligning a phone of flite with a symbol of the prompt; 0 is a match."""
    if phone == "pau":
        return {" ": 0.3}.get(symbol, 0.0 if symbol in _PUNCTUATION else 2.0)
    if symbol in _PUNCTUATION:
        return 2.0
    if symbol[0].isupper():  # a phone of the dictionary, with its stress
        plain = symbol.rstrip("012").lower()
        if plain == phone or (phone == "ax" and symbol in ("AH0", "IH0")):
            return 0.0
        return {(True, True): 0.4, (False, False): 0.8}.get((plain in _VOWELS, phone in _VOWELS), 1.2)
    if symbol == phone[0]:
        return 0.1
    return {(True, True): 0.2, (False, False): 0.5}.get((symbol in "aeiouyw", phone in _VOWELS), 0.9)


def _skip_cost(symbol: str) -> float:
    """The cost of a symbol without a phone."""
    return 0.0 if symbol in _PUNCTUATION + "'" else (0.6 if symbol[0].isupper() else 0.2)


def _stay_cost(symbol: str) -> float:
    """The cost of a further phone for the same symbol."""
    return 0.6 if symbol[0].isupper() else 0.15


def align(phones: Sequence[str], symbols: Sequence[str]) -> np.ndarray:
    """The symbol of each phone.

    Args:
        phones: P phones of a recording, "pau" for a pause; one or more.
        symbols: of the prompt: "<", those of the text, ">".

    Returns:
        indices into ``symbols``, int32 [P], not decreasing.

    >>> align(["pau", "hh", "ax", "l", "ow", "pau"], ["<", "HH", "AH0", "L", "OW1", ".", ">"]).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    skipped = np.cumsum([0.0] + [_skip_cost(s) for s in symbols])  # skipped[i]: the cost to skip all symbols before i
    stay = np.array([_stay_cost(s) for s in symbols])
    match = {phone: np.array([_match_cost(phone, s) for s in symbols]) for phone in set(phones)}
    here = np.arange(len(symbols))
    score, back = match[phones[0]] + skipped[:-1], []
    for phone in phones[1:]:
        reach = score - skipped[1:]  # from symbol i on, all symbols after it are skipped
        best = np.minimum.accumulate(reach)
        source = np.maximum.accumulate(np.where(reach <= best, here, 0))
        moved = np.concatenate([[np.inf], best[:-1] + skipped[1:-1]])
        stayed = score + stay
        back.append(np.where(stayed <= moved, here, np.concatenate([[0], source[:-1]])))
        score = np.minimum(stayed, moved) + match[phone]
    score = score + skipped[-1] - skipped[1:]
    path = [int(score.argmin())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return np.array(path[::-1], np.int32)
