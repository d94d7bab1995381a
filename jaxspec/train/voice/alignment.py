"""Which symbol of the text each spoken phone belongs to, by dynamic programming.

flite tells which phone sounds when; the model reads phones from a dictionary, or letters. The path is monotone: each phone is
given one symbol, several phones may share a symbol (the letter x), and symbols may be passed over (spaces, silent letters).
"""

import numpy as np

_VOWELS = frozenset("aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw".split())


def _cost(phone: str, symbol: str) -> float:
    """How badly a phone of flite fits a symbol of the prompt: 0 fits."""
    if phone == "pau":
        return {" ": 0.3}.get(symbol, 0.0 if symbol in "<>,.?!" else 2.0)
    if symbol in "<> ,.?!":
        return 2.0
    if symbol[0].isupper():
        plain = symbol.rstrip("012").lower()
        if plain == phone or (phone == "ax" and symbol in ("AH0", "IH0")):
            return 0.0
        return {(True, True): 0.4, (False, False): 0.8}.get((plain in _VOWELS, phone in _VOWELS), 1.2)
    if symbol == phone[0]:
        return 0.1
    return {(True, True): 0.2, (False, False): 0.5}.get((symbol in "aeiouyw", phone in _VOWELS), 0.9)


def _skip_cost(symbol: str) -> float:
    return 0.0 if symbol in "<> ,.?!'" else (0.6 if symbol[0].isupper() else 0.2)


_COSTS: dict[tuple[str, str], float] = {}


def _costs(phone: str, symbols: list[str]) -> np.ndarray:
    return np.array([_COSTS.setdefault((phone, s), _COSTS.get((phone, s)) or _cost(phone, s)) for s in symbols])


def align(phones: list[str], symbols: list[str]) -> np.ndarray:
    """The index of each phone's symbol, not decreasing, int32 [len(phones)].

    Args:
        phones: what was spoken, ``pau`` for a pause.
        symbols: the prompt: "<", the text's symbols, ">".

    >>> align(["pau", "hh", "ax", "l", "ow", "pau"], ["<", "HH", "AH0", "L", "OW1", ".", ">"]).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    passed = np.cumsum([0.0] + [_skip_cost(s) for s in symbols])  # passed[i]: cost to pass over all symbols before i
    stay = np.array([0.6 if s[0].isupper() else 0.15 for s in symbols])
    score = _costs(phones[0], symbols) + passed[:-1]
    back = []
    for phone in phones[1:]:
        reach = score - passed[1:]  # from symbol i on, all that follow it are passed over
        best = np.minimum.accumulate(reach)
        source = np.maximum.accumulate(np.where(reach <= best, np.arange(len(symbols)), 0))
        moved = np.concatenate([[np.inf], best[:-1] + passed[1:-1]])
        stayed = score + stay
        back.append(np.where(stayed <= moved, np.arange(len(symbols)), np.concatenate([[0], source[:-1]])))
        score = np.minimum(stayed, moved) + _costs(phone, symbols)
    score = score + passed[-1] - passed[1:]
    path = [int(score.argmin())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return np.array(path[::-1], np.int32)
