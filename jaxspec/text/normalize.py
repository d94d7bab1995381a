"""Text to plain words: numbers, abbreviations and signs written out, accents stripped, punctuation reduced to , . ? and !"""

import re
import unicodedata
from collections.abc import Callable

from jaxspec.text.pronounce import in_dictionary


def _table(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split(", "))


_FRACTIONS = _table("½=one half, ¼=one quarter, ¾=three quarters, ⅓=one third, ⅔=two thirds")
_FRACTIONS |= _table("1/2=one half, 1/4=one quarter, 3/4=three quarters, 1/3=one third, 2/3=two thirds")
_UNACCENTED = str.maketrans(_table("ß=ss, æ=ae, Æ=Ae, ø=o, Ø=O, œ=oe, Œ=Oe, ł=l, Ł=L"))
_DASHES = dict.fromkeys("\u2010\u2011\u2013\u2212", "-") | {"\u2014": " -- "}
_QUOTES = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc`", "'"), **_DASHES, "…": "..."})
_SIGNS = {"&": "and", "@": "at", "+": "plus", "=": "equals", "%": "percent", "°": "degrees", "#": "number"}
_MONEY = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
_UNITS = _table("km=kilometer, cm=centimeter, mm=millimeter, kg=kilogram, mg=milligram, g=gram, m=meter, ml=milliliter, l=liter")
_UNITS |= _table("lb=pound, lbs=pound, oz=ounce, ft=foot, hz=hertz, mph=mile per hour, km/h=kilometer per hour")
_UNITS |= _table("°c=degree celsius, °f=degree fahrenheit")
_PLURALS = {"foot": "feet", "penny": "pence", "hertz": "hertz"}
_ABBREVIATIONS = _table("dr=doctor, mr=mister, mrs=missus, ms=miz, prof=professor, jr=junior, sr=senior, mt=mount, vs=versus")
_ABBREVIATIONS |= _table("e.g=for example, i.e=that is, ave=avenue, rd=road, approx=approximately")
_BEFORE_SAINT = ("in", "at", "to", "near", "the", "from", "by", "on", "for", "and", "with")
_BEFORE_NUMBER = _table("no=number, jan=january, feb=february, mar=march, apr=april, jun=june, jul=july, aug=august")
_BEFORE_NUMBER |= _table("sep=september, sept=september, oct=october, nov=november, dec=december")


def _number(value: int | str, to: str = "cardinal") -> str:
    """An integer in American words: no "and", no hyphens. Very long ones, and those with a leading zero, digit by digit."""
    from num2words import num2words

    digits = str(value).replace(",", "")
    if to == "cardinal" and (len(digits) > 15 or (len(digits) > 1 and digits[0] == "0")):
        return " ".join(num2words(int(digit)) for digit in digits)
    words = num2words(int(digits), to=to)
    return re.sub(r" and\b|,", "", words).replace("-", " ")


def _quantity(digits: str) -> str:
    """A number with an optional fraction, "1,204.50", or a version, "3.11.2", in words."""
    whole, *rest = digits.split(".")
    parts = [_number(whole or "0")]
    parts += [" ".join(_number(digit) for digit in part) for part in rest]
    return " point ".join(parts)


def _plural(words: str) -> str:
    first, *rest = words.split(" ")
    return " ".join([_PLURALS.get(first, first + "s"), *rest])


def _spelled(letters: str) -> str:
    """Letters as words of one letter; A is "ay", since "a" is the article."""
    return " ".join("ay" if letter == "a" else letter for letter in letters.lower() if letter.isalpha())


def _money(match: re.Match) -> str:
    sign, whole, cents, scale = match.groups()
    unit, small = _MONEY[sign]
    if scale or (cents and len(cents) != 2):
        return f" {_quantity(whole.replace(',', '') + ('.' + cents if cents else ''))} {scale or ''} {_plural(unit)} "
    parts = [f"{_number(whole)} {unit if whole == '1' else _plural(unit)}"] if whole else []
    if cents and int(cents):
        parts.append(f"{_number(int(cents))} {small if int(cents) == 1 else _plural(small)}")
    return f" {' and '.join(parts)} "


def _time(match: re.Match) -> str:
    hour, minute, half = match.groups()
    if minute == "00":
        middle = "" if half or int(hour) > 12 else "o'clock"
    else:
        middle = ("oh " if minute[0] == "0" else "") + _number(int(minute))
    return f" {_number(int(hour))} {middle} {_spelled(half or '')} "


def _decade(match: re.Match) -> str:
    words = _number(match[1], "year" if len(match[1]) == 4 else "cardinal")
    return f" {words[:-1]}ies " if words.endswith("y") else f" {words}s "


def _measure(match: re.Match) -> str:
    unit = _UNITS[match[2].lower()]
    return f" {_quantity(match[1])} {unit if match[1] == '1' else _plural(unit)} "


# a.m. or p.m.; its last full stop stays where a capital or nothing follows, as it ends the sentence too.
_HALF = r"\s?([ap]\.?m)\b(?:\.(?!\s+(?-i:[A-Z])|\s*$))?"
_AMOUNT = r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)*|(?<!\d)\.\d+)"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_PRICE = r"([$€£])\s?(\d[\d,]*|(?=\.\d))(?:\.(\d+))?(?:\s(thousand|[mb]illion|trillion)\b)?(?<!,)"
# Each rule sees what the earlier ones left, so that a time, a price or a range is read before its bare numbers are.
_NUMBER_RULES: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (re.compile(r"(\d?)([½¼¾⅓⅔]|\b(?:1/2|1/4|3/4|1/3|2/3)\b)"), lambda m: f"{m[1]}{' and' * bool(m[1])} {_FRACTIONS[m[2]]} "),
    (re.compile(rf"\b(\d{{1,2}}):(\d{{2}})(?:{_HALF})?", re.I), _time),
    (re.compile(rf"(?<=\d){_HALF}", re.I), lambda m: f" {_spelled(m[1])} "),
    (re.compile(_PRICE), _money),
    (re.compile(r"\b(?:\d{3}[-.])?\d{3}-\d{4}\b"), lambda m: " ".join(_number(d) for d in m[0] if d.isdigit())),
    (re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.I), lambda m: _number(m[1], "ordinal")),
    (re.compile(r"'?\b(\d{2}|1\d{3}|20\d{2})(?<=0)'?s\b"), _decade),
    (re.compile(r"(?<![\w-])-(?=\d)"), lambda m: " minus "),
    (re.compile(rf"\b{_AMOUNT}\s?({_UNIT})(?![\w'])", re.I), _measure),
    (re.compile(r"(?<=\d)\s?-\s?(?=\d)"), lambda m: " to "),
    (re.compile(r"(?<![\d.,])(1[1-9]\d\d|20\d\d)(?![\d%]|[.,]\d)"), lambda m: f" {_number(m[1], 'year')} "),
    (re.compile(_AMOUNT), lambda m: f" {_quantity(m[0].replace(',', ''))} "),
]


def _expand_abbreviations(text: str) -> str:
    """Dr., St., etc., U.S. and NHK in words; the full stop goes, unless it also ends the sentence."""
    text = re.sub(r"\betc\.?(?=\s+[A-Z]|\s*$)", "et cetera.", text)
    text = re.sub(r"\betc\b\.?", "et cetera", text)
    text = re.sub(r"(\b\w+\s+|\b)St\.(\s+[A-Z])?", _saint_or_street, text)
    names = "|".join(map(re.escape, _ABBREVIATIONS))
    text = re.sub(rf"\b({names})\.", lambda m: _ABBREVIATIONS[m[1].lower()], text, flags=re.I)
    months = "|".join(_BEFORE_NUMBER)
    text = re.sub(rf"\b({months})\.(?=\s?\d)", lambda m: _BEFORE_NUMBER[m[1].lower()], text, flags=re.I)
    text = re.sub(r"(?<!\d)(?<!\d\s)\b(?:[A-Za-z]\.){2,}", lambda m: _spelled(m[0]) + ("." if m.end() == len(text) else ""), text)
    return re.sub(r"\b([A-Z]{2,5})(s?)\b", _acronym, text)


def _saint_or_street(match: re.Match) -> str:
    """St. is a saint before a name, unless a name stands before it, as in "12 Oak St. It is here"."""
    before, after = match[1], match[2] or ""
    street = before[:1].isupper() and before.strip().lower() not in _BEFORE_SAINT
    if after and not street:
        return f"{before}saint{after}"
    return f"{before}street{'.' * bool(after)}{after}"


def _acronym(match: re.Match) -> str:
    """Capitals that are no word of the dictionary are read letter by letter; so is US, which as a word would be "us"."""
    capitals, plural = match.groups()
    known = in_dictionary(capitals.lower()) and (match[0] != "US" or match.string.isupper())
    return match[0] if known else _spelled(capitals) + ("'s" if plural else "")


def _latin(text: str) -> str:
    """Accents stripped, typographic quotes and dashes made plain."""
    text = text.translate(_UNACCENTED).translate(_QUOTES)
    text = "".join(c if c in _FRACTIONS else unicodedata.normalize("NFKD", c) for c in text)
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    strange = next((c for c in text if c.isalpha() and not c.isascii()), None)
    if strange:
        raise ValueError(f"expected English text, but it has the letter {strange!r}: write it in Latin letters")
    return text


def normalize(text: str) -> str:
    """Writes English text out as lower-case words of a-z and ' with the punctuation , . ? ! alone.

    >>> normalize("Dr. Smith paid $5.20 at 10:30; isn't that (about) 3 km?")
    "doctor smith paid five dollars and twenty cents at ten thirty, isn't that about three kilometers?"

    Raises:
        ValueError: when nothing in the text can be spoken, or a letter is not of the Latin alphabet.
    """
    given, text = text, _latin(text)
    text = _expand_abbreviations(text)
    for pattern, words in _NUMBER_RULES:
        text = pattern.sub(words, text)
    text = re.sub(r"[&@+=%°#]", lambda m: f" {_SIGNS[m[0]]} ", text)
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])", " dot ", text)
    text = re.sub(r"\.\.+(?=\s+[a-z])|[;:]|\s-+(?=\s)|--+", ",", text).lower()
    text = re.sub(r"(?<![a-z])'+|'+(?![a-z])", " ", text)  # quotation marks; an apostrophe inside a word stays
    text = re.sub(r"[^a-z',.?!]+", " ", text)
    text = re.sub(r"[\s,.?!]*[,.?!][\s,.?!]*", lambda m: next(c for c in "?!.," if c in m[0]) + " ", text)
    text = text.strip().lstrip(",.?! ")
    if not text:
        raise ValueError(f"expected text with at least one word to speak, but {given[:40]!r} has none: write some words")
    return text
