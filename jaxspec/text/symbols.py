"""Text to symbols, on the host: any English text -> plain words -> sentences -> phones and letters.

``normalize`` writes everything out in words, ``sentences`` cuts the words into pieces that fit the model, ``to_symbols``
looks each word up in the CMU dictionary (unknown words stay in letters), and ``encode`` numbers the symbols.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from jaxspec.text.cut import halve
from jaxspec.text.normalize import normalize, nothing_to_speak, warn_skipped, written_out
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
_BORDERS = [re.compile("(?<=,) "), re.compile(" ")]
_SYMBOL_ID = {symbol: index for index, symbol in enumerate(SYMBOLS)}


def sentences(text: str, max_symbols: int) -> list[str]:
    """Normalises a text and cuts it into pieces of at most ``max_symbols`` symbols, each of which ends with punctuation.

    The borders are . ? ! and ends of lines; a piece that is too long is halved at the comma nearest to its
    middle, else between words. A word that is too long is broken up.

    >>> sentences("One. Two, and three", 20)
    ['one.', 'two, and three.']

    Args:
        text: any text.
        max_symbols: the largest number of symbols in a piece, at least 8, as many as the letter w takes.

    Warns:
        TextWarning: for each part without a spoken form, which is skipped, and each word that is broken up.

    Raises:
        ValueError: there is nothing to speak.
    """
    spoken = [written_out(line) for line in text.splitlines() if line.strip()]
    lines = [words for words, _ in spoken if words]
    if not lines:
        raise nothing_to_speak(text)
    warn_skipped(part for _, skipped in spoken for part in skipped)
    whole = [s if s[-1] in ",.?!" else s + "." for line in lines for s in re.split(r"(?<=[.?!]) ", line)]
    return [piece for s in whole for piece in halve(s, lambda p: len(to_symbols(p)), max_symbols, _BORDERS, tail=",")]


def to_symbols(text: str, spell: Callable[[str], bool] | None = None) -> list[str]:
    """The symbols of a normalised sentence: each word's phones, or its letters if it is unknown or ``spell(word)`` is true.

    >>> to_symbols("hi, zyqx.")
    ['HH', 'AY1', ',', ' ', 'z', 'y', 'q', 'x', '.']

    Args:
        text: what ``normalize`` returns; other characters are left out.
        spell: whether to spell a word although its phones are known; called once for each word, in order.

    Returns:
        Members of ``SYMBOLS``.
    """
    out: list[str] = []
    for part in re.findall(r"[a-z']+|[ ,.?!]", text):
        phones = None if part in " ,.?!" or (spell and spell(part)) else pronounce(part)
        out += phones or part
    return out


def encode(symbols: Iterable[str]) -> np.ndarray:
    """The numbers of symbols.

    >>> encode(["HH", "AY1"])
    array([84, 49], dtype=int32)

    Args:
        symbols: N members of ``SYMBOLS``.

    Returns:
        int32 [N], their indices in ``SYMBOLS``.

    Raises:
        ValueError: for a symbol that is not in the table.
    """
    symbols = list(symbols)
    unknown = sorted(set(symbols) - set(_SYMBOL_ID))
    if unknown:
        raise ValueError(f"expected symbols of jaxspec.text.symbols.SYMBOLS, got {unknown[0]!r}: make them with to_symbols")
    return np.array([_SYMBOL_ID[symbol] for symbol in symbols], np.int32)
