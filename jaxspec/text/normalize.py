"""Text to plain words: numbers, abbreviations and signs written out, accents stripped, punctuation reduced to , . ? and !"""

import re
import warnings
from collections.abc import Iterable

from jaxspec.text import TextWarning, numbers
from jaxspec.text.abbreviations import expand, spell_acronyms
from jaxspec.text.characters import SIGNS, plain

# Signs whose reading depends on what is beside them; brackets, asterisks, underscores and their like are passed over.
_IN_CONTEXT = [
    (r"([#$*+=%~^@&<>|_\\])\1\1+", " "),  # a rule or a frame drawn with signs
    (r"(?m)^[ \t]*#+[ \t]+(?!\d)", " "),  # a heading
    (r"https?://", " "),
    (r"[-=]>", " → "),
    (r"<=", "≤"),
    (r">=", "≥"),
    (r"!=", "≠"),
    (r"==", "="),
    (r"#(?=\s?\d)", " number "),
    (r"(?<=\b[A-G])#", " sharp "),
    (r"~(?=\s?[$€£¥]?\d)", " about "),
    (r"(?<=\s)<(?=\s)|<(?=\s?-?\d)", " less than "),
    (r"(?<=\s)>(?=\s)|>(?=\s?-?\d)", " greater than "),
]
_MOST_WARNINGS = 10  # for one text
_SIGN = re.compile("[" + "".join(map(re.escape, SIGNS)) + "]")


def normalize(text: str) -> str:
    """Writes English text out as lower-case words of a-z and ' with the punctuation , . ? ! alone.

    Normalised text is returned unchanged. Brackets, quotation marks and other marks that a reader passes over are left out.

    >>> normalize("Dr. Smith paid $5.20 at 10:30; isn't that (about) 3 km?")
    "doctor smith paid five dollars and twenty cents at ten thirty, isn't that about three kilometers?"

    Args:
        text: any text; words that are not English are read as if they were.

    Returns:
        The words, one space apart.

    Warns:
        TextWarning: for each part that was skipped, as emoji and letters that are not Latin have no spoken form.

    Raises:
        ValueError: when nothing in the text can be spoken.
    """
    words, skipped = written_out(text)
    if not words:
        raise nothing_to_speak(text)
    warn_skipped(skipped)
    return words


def nothing_to_speak(text: str) -> ValueError:
    """The error for a text without a word."""
    return ValueError(f"expected text with at least one word to speak, got {text[:40]!r}: write some words in Latin letters")


def warn_skipped(skipped: Iterable[str]) -> None:
    """One ``TextWarning`` for each different part that was skipped; a text in another alphabet gets a few and their number."""
    parts = [part if len(part) <= 20 else part[:20] + "..." for part in dict.fromkeys(skipped)]
    for part in parts[:_MOST_WARNINGS]:
        shown = part.encode("utf-8", "backslashreplace").decode()
        warnings.warn(f'skipped "{shown}", which has no spoken form', TextWarning, stacklevel=3)
    if (more := len(parts) - _MOST_WARNINGS) > 0:
        warnings.warn(f"skipped {more} more parts, which have no spoken form", TextWarning, stacklevel=3)


def written_out(text: str) -> tuple[str, list[str]]:
    """What ``normalize`` returns, or '' when nothing can be spoken, and the parts that were skipped."""
    text, skipped = plain(text)
    words = _words(text)
    while (again := _words(words)) != words:  # a full stop may come next to an abbreviation only now
        words = again
    return words, skipped


def _words(text: str) -> str:
    for pattern, word in _IN_CONTEXT:
        text = re.sub(pattern, word, text)
    shouted, text = text.isupper(), expand(text)
    for rule, words in numbers.RULES:
        text = rule.sub(words, text)
    text = spell_acronyms(text, shouted)
    text = _SIGN.sub(lambda m: f" {SIGNS[m[0]]} ", text)
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])", " dot ", text)
    text = re.sub(r"\.\.+(?=\s+[a-z])|[;:]|\s-+(?=\s)|--+", ",", text).lower()
    text = re.sub(r"(?<![a-z])'+|'+(?![a-z])", " ", text)  # quotation marks; an apostrophe inside a word stays
    text = re.sub(r"[^a-z',.?!]+", " ", text)
    text = re.sub(r"[\s,.?!]*[,.?!][\s,.?!]*", lambda m: next(c for c in "?!.," if c in m[0]) + " ", text)
    return text.strip().lstrip(",.?! ")
