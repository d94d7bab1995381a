"""Text that is too long for a model, in pieces that fit."""

import re
import warnings
from collections.abc import Callable, Sequence

from jaxspec.text import TextWarning


def halve(text: str, size: Callable[[str], int], limit: int, borders: Sequence[re.Pattern], tail: str = "") -> list[str]:
    """Cuts a text in two at the border nearest to its middle, and the halves again, until each piece fits.

    >>> halve("one two three, four five", len, 14, [re.compile("(?<=,) "), re.compile(" ")])
    ['one two three,', 'four five']

    Args:
        text: one sentence.
        size: gives the size of a piece, in the unit of ``limit``.
        limit: the largest size of a piece.
        borders: where a text may be cut, the best places first; the characters that a pattern matches are left out.
            One long word, which has no border, is cut into parts of about equal length.
        tail: the mark that each piece but the last ends with.

    Warns:
        TextWarning: a word was broken up.

    Raises:
        ValueError: a single character is larger than the limit.
    """
    if size(text) <= limit:
        return [text]
    spans = ([match.span() for match in pattern.finditer(text) if 0 < match.end() < len(text)] for pattern in borders)
    places = next(filter(None, spans), None)
    if places is None:
        return _break_up(text, size, limit, tail)
    start, end = min(places, key=lambda place: abs(place[0] - len(text) / 2))
    left, right = text[:start].strip(), text[end:].strip()
    left += tail * (not left.endswith(tail))
    return halve(left, size, limit, borders, tail) + halve(right, size, limit, borders, tail)


def _break_up(text: str, size: Callable[[str], int], limit: int, tail: str) -> list[str]:
    """One long word, and the punctuation after it, in the fewest parts of equal length that fit."""
    word = text.rstrip(",.?!")
    for count in range(max(2, size(text) // limit), len(word) + 1):
        length = -(-len(word) // count)
        parts = [word[start : start + length] + tail for start in range(0, len(word), length)]
        parts[-1] = parts[-1].removesuffix(tail) + text[len(word) :]
        if all(size(part) <= limit for part in parts):
            shown = word if len(word) <= 20 else word[:20] + "..."
            warnings.warn(f'broke up "{shown}", a word of {len(word)} characters', TextWarning, stacklevel=3)
            return parts
    raise ValueError(f"expected a limit of at least the size of one character, got {limit}: choose a larger one")
