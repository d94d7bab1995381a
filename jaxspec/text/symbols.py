"""Text to symbols, on the host: any English text -> plain words -> sentences -> phones and letters.

The order: ``normalize`` writes everything out in words, ``sentences`` cuts it into pieces that fit the model, ``to_symbols``
looks the words up in the CMU dictionary (unknown ones stay in letters), ``encode`` numbers the symbols.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from jaxspec.text.normalize import normalize
from jaxspec.text.pronounce import pronounce

__all__ = ["SYMBOLS", "encode", "normalize", "pronounce", "sentences", "to_symbols"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
# The start of the text (also the padding), the word border, punctuation, letters, and the phones of cmudict with their stress.
SYMBOLS: tuple[str, ...] = (
    *("_", " ", ",", ".", "?", "!"),
    *_LETTERS,
    "'",
    *(vowel + stress for vowel in _VOWELS for stress in "012"),
    *_CONSONANTS,
)
_SYMBOL_ID = {symbol: index for index, symbol in enumerate(SYMBOLS)}


def sentences(text: str, max_symbols: int) -> list[str]:
    """Normalises a text and cuts it into pieces of at most ``max_symbols`` symbols, each of which ends with punctuation.

    The borders are . ? ! and ends of lines; a piece that is too long is halved at the comma nearest to its
    middle, else at a word.

    Raises:
        ValueError: when there is nothing to speak, or one word alone is too long.
    """
    lines = [normalize(line) for line in text.splitlines() if any(c.isalnum() for c in line)] or [normalize(text)]
    whole = [s if s[-1] in ",.?!" else s + "." for line in lines for s in re.split(r"(?<=[.?!]) ", line)]
    return [piece for sentence in whole for piece in _halve(sentence, max_symbols)]


def _halve(sentence: str, max_symbols: int) -> list[str]:
    if len(to_symbols(sentence)) <= max_symbols:
        return [sentence]
    borders = [m.start() for m in re.finditer("(?<=,) ", sentence)] or [m.start() for m in re.finditer(" ", sentence)]
    if not borders:
        raise ValueError(f"expected words of at most {max_symbols} symbols, but {sentence[:40]!r} is longer: break it up")
    middle = min(borders, key=lambda border: abs(border - len(sentence) / 2))
    left, right = sentence[:middle], sentence[middle + 1 :]
    return _halve(left if left[-1] == "," else left + ",", max_symbols) + _halve(right, max_symbols)


def to_symbols(text: str, spell: Callable[[str], bool] | None = None) -> list[str]:
    """The symbols of a normalised sentence: each word's phones, or its letters if it is unknown or ``spell(word)`` is true.

    >>> to_symbols("hi, zyqx.")
    ['HH', 'AY1', ',', ' ', 'z', 'y', 'q', 'x', '.']
    """
    out: list[str] = []
    for part in re.findall(r"[a-z']+|[ ,.?!]", text):
        phones = None if part in " ,.?!" or (spell and spell(part)) else pronounce(part)
        out += phones or part
    return out


def encode(symbols: Iterable[str]) -> np.ndarray:
    """Symbols as int32 [N] indices into ``SYMBOLS``.

    Raises:
        ValueError: for a symbol that is not in the table.
    """
    symbols = list(symbols)
    unknown = sorted(set(symbols) - set(_SYMBOL_ID))
    if unknown:
        raise ValueError(f"expected symbols of jaxspec.text.symbols.SYMBOLS, but {unknown[0]!r} came: make them with to_symbols")
    return np.array([_SYMBOL_ID[symbol] for symbol in symbols], np.int32)
