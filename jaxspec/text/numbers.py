"""Numbers in words, with what is written beside them: money, units, dates, times, ranges, powers."""

import re
import string
from collections.abc import Callable
from functools import lru_cache

from jaxspec.text.abbreviations import spelled
from jaxspec.text.tables import pairs

_MONTHS = "january february march april may june july august september october november december".split()
_MONEY = pairs("$=dollar cent, €=euro cent, £=pound penny, ¥=yen, ₹=rupee paisa, ₩=won, ₽=ruble kopeck, ₿=bitcoin, ¢=cent")
_SCALES = pairs("k=thousand, m=million, mn=million, b=billion, bn=billion, t=trillion, tn=trillion")
_PLURALS = pairs("foot=feet, inch=inches, penny=pence, paisa=paise, yen=yen, won=won")
_PREFIXES = pairs("n=nano, μ=micro, m=milli, c=centi, k=kilo, K=kilo, M=mega, G=giga, T=tera, P=peta")
# Each unit with the prefixes that are written before it; a unit alone is named where people write it beside a number.
_PREFIXED = pairs("m=meter nμmck, g=gram μmk, l=liter μm, L=liter μm, Hz=hertz kMG, W=watt mkMG, Wh=watt-hour kMG, V=volt μmk")
_PREFIXED |= pairs("B=byte kKMGTP, b=bit kMG, bps=bit/second kMG, s=second nμm, cal=calorie k, Ω=ohm kM, J=joule kM, A=amp m")
_PREFIXED |= pairs("Pa=pascal kM")
_ALONE = pairs("m=meter, g=gram, l=liter, L=liter, Hz=hertz, W=watt, V=volt, Ω=ohm, Wh=watt-hour, lb=pound, lbs=pound, oz=ounce")
_ALONE |= pairs("ft=foot, yd=yard, mi=mile, gal=gallon, px=pixel, dB=decibel, mph=mile/hour, kph=kilometer/hour, bps=bit/second")
_ALONE |= pairs("h=hour, hr=hour, hrs=hour, min=minute, mins=minute, sec=second, secs=second, rpm=revolution/minute")
_ALONE |= pairs("fps=frame/second")
_ALONE |= {"°C": "degree celsius", "°F": "degree fahrenheit"}
_PER = pairs("h=hour, s=second, min=minute, d=day, l=liter, kg=kilogram, m=meter, day=day, week=week, year=year")
_UNITS = {p + unit: _PREFIXES[p] + name for unit, (name, ps) in ((u, v.split(" ")) for u, v in _PREFIXED.items()) for p in ps}
_UNITS = {unit: name.replace("/", " per ") for unit, name in (_UNITS | _ALONE).items()}
_NO_UNITS = {*string.ascii_uppercase, "MS", "MA", "MI", "NS"}  # 5G, 3M, Boston 02134 MA
_ANY_CASE = {unit.lower(): name for unit, name in reversed(_UNITS.items())}


@lru_cache(maxsize=4096)
def _number(value: int | str, to: str = "cardinal") -> str:
    """An integer in American words, without "and" or hyphens; 16 digits and more, and a leading zero, digit by digit."""
    from num2words import num2words

    digits = str(value).replace(",", "")
    if len(digits) > 15 or (to == "cardinal" and len(digits) > 1 and digits[0] == "0"):
        return _digits(digits)
    words = num2words(int(digits), to=to)
    return re.sub(r" and\b|,", "", words).replace("-", " ")


def _digits(text: str) -> str:
    return " ".join(_number(digit) for digit in text if digit.isdecimal())


def _quantity(digits: str) -> str:
    """A number with an optional fraction, "1,204.50", or a version, "3.11.2", in words."""
    whole, *rest = digits.replace(",", "").split(".")
    return " point ".join([_number(whole or "0"), *map(_digits, rest)])


def _plural(words: str) -> str:
    first, *rest = words.split(" ")
    return " ".join([_PLURALS.get(first) or first + "s" * (not first.endswith("hertz")), *rest])


def _count(value: str, unit: str) -> str:
    return unit if value == "1" else _plural(unit)


def _price(match: re.Match) -> str:
    """A sign before its number, with the minus on either side of the sign and a scale after the number."""
    minus, sign, minus_too, whole, cents, scale = match.groups()
    unit, *small = _MONEY[sign].split(" ")
    start = " minus " if minus or minus_too else " "
    if scale or (cents and (len(cents) != 2 or not small)):
        scale = scale and _SCALES.get(scale.strip().lower(), scale)
        return f"{start}{_quantity(whole + ('.' + cents if cents else ''))} {scale or ''} {_plural(unit)} "
    parts = [f"{_number(whole)} {_count(whole, unit)}"] if whole else []
    if cents and int(cents):
        parts.append(f"{_number(int(cents))} {_count(str(int(cents)), small[0])}")
    return f"{start}{' and '.join(parts)} "


def _amount(match: re.Match) -> str:
    """A sign after its number, "5 €" or "5¢"."""
    return f" {_quantity(match[1])} {_count(match[1], _MONEY[match[2]].split(' ')[0])} "


def _time(match: re.Match) -> str:
    hour, minute, second, half = match.groups()
    if minute == "00":
        middle = "" if half or second or int(hour) > 12 else "o'clock"
    else:
        middle = ("oh " if minute[0] == "0" else "") + _number(int(minute))
    seconds = f"and {_number(int(second))} {_count(second.lstrip('0'), 'second')}" if second else ""
    return f" {_number(int(hour))} {middle} {seconds} {spelled(half or '')} "


def _date(year: str, month: str, day: str) -> str | None:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return None
    full = int(year) if len(year) == 4 else int(year) + (2000 if int(year) < 70 else 1900)
    return f" {_MONTHS[int(month) - 1]} {_number(int(day), 'ordinal')}, {_number(full, 'year')} "


def _iso_date(match: re.Match) -> str:
    return _date(match[1], match[3], match[4]) or match[0]


def _short_date(match: re.Match) -> str:
    """Month first, as in America, unless that is no month; with full stops day first, as in Europe."""
    first, mark, second, year = match.groups()
    american, european = _date(year, first, second), _date(year, second, first)
    return (european or american if mark == "." else american or european) or match[0]


def _fraction(match: re.Match) -> str:
    whole, over, under = match.groups()
    if int(over) >= int(under):
        return match[0]
    name = {"2": "half", "4": "quarter"}.get(under) or _number(under, "ordinal")
    part = f"{_number(over)} {name if over == '1' else _plural(name)}"
    return f" {_quantity(whole)} and {part} " if whole else f" {part} "


def _decade(match: re.Match) -> str:
    words = _number(match[1], "year" if len(match[1]) == 4 else "cardinal")
    return f" {words[:-1]}ies " if words.endswith("y") else f" {words}s "


def _measure(match: re.Match) -> str:
    """A number with its unit: "5 km", "5-km" in the singular, "5 m^2", "5 m/s^2"."""
    number, joint, short, power, per, squared = match.groups()
    name = _UNITS.get(short) or (None if short in _NO_UNITS else _ANY_CASE.get(short.lower()))
    if name is None:
        return match[0]
    name = name if joint == "-" else _count(number, name)
    name = {"2": "square ", "3": "cubic "}.get(power, "") + name
    return f" {_quantity(number)} {name}{f' per {_PER[per.lower()]}' if per else ''}{' squared' * bool(squared)} "


def _scaled(match: re.Match) -> str:
    return f" {_quantity(match[1])} {_SCALES[match[2].lower()]} "


# a.m. or p.m.; its last full stop stays where a capital or nothing follows, as it ends the sentence too.
_HALF = r"\s?([ap]\.?m)\b(?:\.(?!\s+(?-i:[A-Z])|\s*$))?"
_AMOUNT = r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)*|(?<!\d)\.\d+)"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_PER_UNIT = rf"(?:/({'|'.join(_PER)})(\^2)?)?"
_SIGN = "[$€£¥₹₩₽₿]"
_SCALE = r"(?:(\s(?:thousand|[mb]illion|trillion)|[kKmMbBtT]|\s?[mbt]n)\b)?"
_PRICE = rf"((?<![\w-])-\s?)?({_SIGN})\s?(-\s?)?(\d[\d,]*|(?=\.\d))(?:\.(\d+))?{_SCALE}(?<!,)"
# Each rule sees what the earlier ones left, so that a time, a price or a range is read before its bare numbers are.
RULES: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (re.compile(r"(?<![\d/-])(\d{4})([-/])(\d{2})\2(\d{2})(?![\d/-])"), _iso_date),
    (re.compile(r"(?<![\d/.-])(\d{1,2})([-/.])(\d{1,2})\2(\d{4}|(?<=/)\d{2})(?![\d/-]|\.\d)"), _short_date),
    (re.compile(r"(?:\(\d{3}\)\s?|\b\d{3}[-.])?\b\d{3}-\d{4}\b(?!-)"), lambda m: f" {_digits(m[0])} "),
    (re.compile(r"\b\d+(?:-\d+){2,}\b"), lambda m: " ".join(map(_digits, m[0].split("-")))),
    (re.compile(rf"(?:(?<=\d)|(?<=\d%)|(?<=°[CF])|(?<=\d°))\s?-\s?(?={_SIGN}?\d)"), lambda m: " to "),
    (re.compile(r"(?:\b(\d+)\s+)?(?<![\d/.])([1-9]\d?)/([2-9]|10|12|16|32|64|100)(?![\d/])"), _fraction),
    (re.compile(r"\b(\d+)'\s?(\d+)(?:\"|'')"), lambda m: f" {_number(m[1])} {_count(m[1], 'foot')} {_number(m[2])} inches "),
    (re.compile(rf"(?<![\d:])(\d{{1,2}}):(\d{{2}})(?::(\d{{2}}))?(?![\d:])(?:{_HALF})?", re.I), _time),
    (re.compile(r"(?<=\d):(?=\d)"), lambda m: " to "),
    (re.compile(rf"(?<=\d){_HALF}", re.I), lambda m: f" {spelled(m[1])} "),
    (re.compile(_PRICE), _price),
    (re.compile(rf"(?<![\d.,]){_AMOUNT}\s?([$€£¥₹₩₽₿¢])"), _amount),
    (re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.I), lambda m: _number(m[1], "ordinal")),
    (re.compile(r"'?\b(\d{2}|1\d{3}|20\d{2})(?<=0)'?s\b"), _decade),
    (re.compile(r"(?<=\d)[eE]([-+]?)(?=\d+\b)"), lambda m: f" times ten to the power of {m[1]}"),
    (re.compile(r"(?<=\w)\^(?=[-+])"), lambda m: " to the power of "),
    (re.compile(r"(?<![\w-])-(?=\.?\d)"), lambda m: " minus "),
    (re.compile(rf"\b{_AMOUNT}([\s-]?)({_UNIT})(?:\^([23]))?{_PER_UNIT}(?![\w^'])(?:\.(?=\s+(?-i:[a-z])))?", re.I), _measure),
    (re.compile(r"\b(\d+\.\d+)([KMB])\b"), _scaled),
    (re.compile(r"(?:(?<=\b[A-Za-z])|(?<=\d))\^([23])(?!\d)"), lambda m: " squared " if m[1] == "2" else " cubed "),
    (re.compile(r"(?<=\w)\^(?=\w)"), lambda m: " to the power of "),
    (re.compile(r"(?<=\d)\s?\*\s?(?=\d)"), lambda m: " times "),
    (re.compile(r"(?<![\d.,])(1[1-9]\d\d|20\d\d)(?![\d%]|[.,]\d)"), lambda m: f" {_number(m[1], 'year')} "),
    (re.compile(_AMOUNT), lambda m: f" {_quantity(m[0])} "),
]
