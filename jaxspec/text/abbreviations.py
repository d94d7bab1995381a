"""Abbreviations, acronyms and Roman numerals in words."""

import re
from collections.abc import Callable, Iterable

from jaxspec.text.pronounce import in_dictionary
from jaxspec.text.tables import pairs

_ANYWHERE = pairs("dr=doctor, mr=mister, mrs=missus, prof=professor, mt=mount, vs=versus, approx=approximately")
_ANYWHERE |= pairs("e.g=for example, i.e=that is, a.k.a=also known as, messrs=messers, ph.d=p h d")
_BEFORE_NAME = pairs("Ms=miz, Sgt=sergeant, Gen=general, Col=colonel, Capt=captain, Lt=lieutenant, Cpl=corporal, Maj=major")
_BEFORE_NAME |= pairs("Gov=governor, Sen=senator, Rep=representative, Rev=reverend, Hon=honorable, Pres=president")
_BEFORE_NAME |= pairs("Fr=father, Ft=fort, Adm=admiral, Cmdr=commander, Supt=superintendent")
_AFTER_NAME = pairs("inc=incorporated, ltd=limited, co=company, corp=corporation, bros=brothers, jr=junior, sr=senior")
_AFTER_NAME |= pairs("ave=avenue, rd=road, blvd=boulevard, ln=lane, hwy=highway, dept=department, univ=university, esq=esquire")
_AFTER_NAME |= pairs("assn=association")
_BEFORE_NUMBER = pairs("no=number, nos=numbers, fig=figure, figs=figures, vol=volume, ch=chapter, sec=section, eq=equation")
_BEFORE_NUMBER |= pairs("pp=pages, p=page, apt=apartment, rm=room, ext=extension, art=article, jan=january, feb=february")
_BEFORE_NUMBER |= pairs("mar=march, apr=april, jun=june, jul=july, aug=august, sep=september, sept=september, oct=october")
_BEFORE_NUMBER |= pairs("nov=november, dec=december")
_BEFORE_SAINT = ("in", "at", "to", "near", "the", "from", "by", "on", "for", "and", "with")
_MONARCHS = "Henry Elizabeth Louis Charles George Edward Richard James William Philip Catherine Frederick Napoleon Nicholas Peter"
_MONARCHS += " Paul Benedict Pius Francis Ivan Alexander Leo Gregory Ferdinand Robert Mary Margaret King Queen Pope"
_ROMAN = "_ I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX".split()


def spelled(letters: str) -> str:
    """Letters as words of one letter; A is "ay", since "a" is the article."""
    return " ".join("ay" if letter == "a" else letter for letter in letters.lower() if letter.isalpha())


def _after_name(match: re.Match) -> str:
    short, ends = match.groups()
    return _AFTER_NAME[short.lower()] + "." * (ends is not None)


def _saint_or_street(match: re.Match) -> str:
    """St. is a saint before a name, unless a name comes before it, as in "12 Oak St. It is here"."""
    before, after = match[1], match[2] or ""
    street = before[:1].isupper() and before.strip().lower() not in _BEFORE_SAINT
    if after and not street:
        return f"{before}saint{after}"
    return f"{before}street{'.' * bool(after)}{after}"


def _roman(match: re.Match) -> str:
    """Numerals after a name: "Henry the 8th" for monarchs and popes, "Chapter 4" for everything else."""
    name, numeral = match.groups()
    value = _ROMAN.index(numeral)
    return f"{name} the {value}th" if name in _MONARCHS.split() else f"{name} {value}"


def _any(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


_RULES: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [
    (re.compile(r"\betc\.?(?=\s+[A-Z]|\s*$)"), "et cetera."),
    (re.compile(r"\betc\b\.?"), "et cetera"),
    (re.compile(r"(\b\w+\s+|\b)St\.(\s+[A-Z])?"), _saint_or_street),
    (re.compile(rf"\b({_any(_ANYWHERE)})\.", re.I), lambda m: _ANYWHERE[m[1].lower()]),
    (re.compile(rf"\b({_any(_AFTER_NAME)})\.(?=(\s+(?-i:[A-Z])|\s*$)?)", re.I), _after_name),
    (re.compile(rf"\b({_any(_BEFORE_NAME)})\.(?=\s+[A-Z])"), lambda m: _BEFORE_NAME[m[1]]),
    (re.compile(rf"\b({_any(_BEFORE_NUMBER)})\.(?=\s?\d)", re.I), lambda m: _BEFORE_NUMBER[m[1].lower()]),
    (re.compile(rf"\b([A-Z][a-z]{{2,}}) ({_any(_ROMAN[2:])})\b"), _roman),
    (
        re.compile(r"(?<!\d)(?<!\d\s)\b(?:[A-Za-z]\.){2,}(?:[A-Z]\b)?(?![A-Za-z])(\s*$)?"),
        lambda m: spelled(m[0]) + "." * (m[1] is not None),
    ),
]


def expand(text: str) -> str:
    """Dr., St., etc., U.S. and Louis XIV in words; the full stop goes, unless it also ends the sentence."""
    for pattern, words in _RULES:
        text = pattern.sub(words, text)
    return text


def spell_acronyms(text: str, shouted: bool) -> str:
    """Capitals that are no word of the dictionary letter by letter; so is US, which as a word would be "us".

    Args:
        text: with its numbers written out, as their units may be capitals.
        shouted: whether the text was all in capitals, where US may well be the word.
    """

    def spell(match: re.Match) -> str:
        capitals, plural = match.groups()
        known = in_dictionary(capitals.lower()) and (match[0] != "US" or shouted)
        return match[0] if known else spelled(capitals) + ("'s" if plural else "")

    return re.sub(r"\b([A-Z]{2,5})(s?)\b", spell, text)
