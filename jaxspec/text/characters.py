"""Unicode to plain characters: ASCII, and the signs that have a spoken name. What has neither is reported."""

import re
import unicodedata
from functools import cache

# What each sign is called where no rule for numbers reads it.
SIGNS = {"&": "and", "@": "at", "+": "plus", "=": "equals", "%": "percent", "‰": "per thousand", "°": "degrees", "#": "hash"}
SIGNS |= {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "¢": "cents", "₹": "rupees", "₩": "won", "₽": "rubles"}
SIGNS |= {"₿": "bitcoin", "©": "copyright", "®": "registered", "™": "trademark", "§": "section", "¶": "paragraph"}
SIGNS |= {"×": "times", "÷": "divided by", "±": "plus or minus", "√": "square root of", "∞": "infinity", "∑": "sum of"}
SIGNS |= {"≤": "less than or equal to", "≥": "greater than or equal to", "≠": "is not equal to", "≈": "approximately"}
SIGNS |= {"→": "to", "∆": "delta", "μ": "micro", "Ω": "ohms"}

_APOSTROPHES, _QUOTES, _HYPHENS, _DASHES = (
    "\u2018\u2019\u201b\u02bc\u2032`´",
    "“”‟″",
    "\u2010\u2011\u2012\u2013\u2212",
    "\u2014\u2015",
)
_PLAIN = str.maketrans(
    {
        **dict.fromkeys(_APOSTROPHES, "'"),
        **dict.fromkeys(_QUOTES, '"'),
        **dict.fromkeys(_HYPHENS, "-"),
        **dict.fromkeys(_DASHES, " -- "),
        **{"№": "No. ", "˚": "°", "\u2044": "/", "\u2215": "/", "∙": " ", "。": ".", "、": ",", "\u00ad": ""},
    }
)
_LETTERS = {"ß": "ss", "ẞ": "SS", "þ": "th", "Þ": "Th", "ð": "th", "Ð": "Th", "ı": "i", "ə": "e"}  # not told by their names
_LATIN = re.compile(r"LATIN (SMALL|CAPITAL) (?:LETTER|LIGATURE) ([A-Z]{1,2})(?: WITH .*)?")
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]+")
_COMPATIBLE = re.compile("[^™]+")  # NFKC makes TM of the sign


def plain(text: str) -> tuple[str, list[str]]:
    """Any text in ASCII and the characters of ``SIGNS``, after compatibility normalisation (NFKC).

    Typographic quotes, dashes and spaces become plain, accents are stripped, digits of any script become ASCII, powers
    and fractions are written out, and a single Greek letter is named. Brackets and other punctuation become spaces.

    >>> plain("naïve “x²” costs ５ € 😀")
    ('naive "x^2" costs 5 €  ', ['😀'])

    Returns:
        The plain text, and the runs of characters that were left out because they have no spoken form, in order.
    """
    text = re.sub("[¼-¾⅐-⅞↉]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = text.translate(_PLAIN)
    text = _COMPATIBLE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text).translate(_PLAIN)
    text = _GREEK.sub(_greek, text)
    out, run, skipped = [], "", []
    for character in [*text, "\n"]:
        form = _form(character)
        if form is None or (run and not form):  # joiners and accents belong to the character before them
            run += character
            continue
        if run:
            skipped.append(run)
            out.append(" ")
        run = ""
        out.append(form)
    return "".join(out[:-1]), skipped


@cache
def _form(character: str) -> str | None:
    """A character in ASCII or as it is in ``SIGNS``; '' for what has no sound of its own; None for what cannot be spoken."""
    category = unicodedata.category(character)
    if character in SIGNS or " " <= character <= "~":
        return character
    if character.isspace() or category[0] in "PZ":
        return "\n" if character == "\n" else " "
    if category[0] == "M" or category in ("Cc", "Cf"):
        return ""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    base = unicodedata.normalize("NFKD", character)[0]
    if base in _LETTERS or (base.isascii() and base.isalpha()):
        return _LETTERS.get(base, base)
    if named := _LATIN.fullmatch(unicodedata.name(base, "")):
        return named[2].lower() if named[1] == "SMALL" else named[2].capitalize()
    return None


def _greek(match: re.Match) -> str:
    """The name of a Greek letter that is alone; a word in Greek is left as it is."""
    letter = match[0]
    named = re.search(r"LETTER (?:FINAL )?(\w+)", unicodedata.name(letter, "")) if len(letter) == 1 else None
    if letter in SIGNS or named is None:
        return letter
    return f" {named[1].lower().replace('lamda', 'lambda')} "
