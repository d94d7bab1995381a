"""Text to symbols: what is said for numbers, signs and abbreviations, where long text is cut, and the held-out sentences."""

import random
import re
from importlib.resources import files

import numpy as np
import pytest

from jaxspec.text.symbols import SYMBOLS, encode, normalize, pronounce, sentences, to_symbols
from jaxspec.train.voice.sentences import _SLOT_WORDS, TEMPLATES

SPOKEN = {
    "Hello, World!": "hello, world!",
    "I have 3 cats and 1,204 dogs.": "i have three cats and one thousand two hundred four dogs.",
    "pi is 3.14": "pi is three point one four",
    "It's -5°F or 20 °C": "it's minus five degrees fahrenheit or twenty degrees celsius",
    "the 1st, 2nd, 23rd and 100th": "the first, second, twenty third and one hundredth",
    "in 1998 and 2024, not 1905": "in nineteen ninety eight and twenty twenty four, not nineteen oh five",
    "the 1990s or the '80s": "the nineteen nineties or the eighties",
    "$5.20, £1, €3": "five dollars and twenty cents, one pound, three euros",
    "$.50 or $2.5 billion": "fifty cents or two point five billion dollars",
    "50% & more": "fifty percent and more",
    "at 10:30, 9:05pm and 7:00": "at ten thirty, nine oh five p m and seven o'clock",
    "At 5 p.m. We left at 7 a.m. sharp": "at five p m. we left at seven ay m sharp",
    "5 km, 1 kg, 6ft, 60 mph": "five kilometers, one kilogram, six feet, sixty miles per hour",
    "half: 1/2, 5½, 24/7": "half, one half, five and one half, twenty four seven",
    "1998-2003, 10-12": "nineteen ninety eight to two thousand three, ten to twelve",
    "call 555-1234": "call five five five one two three four",
    "agent 007": "agent zero zero seven",
    "Dr. and Mrs. Lee vs. Mr. Ray": "doctor and missus lee versus mister ray",
    "St. Paul lives in St. Louis, 12 Oak St. It is far.": "saint paul lives in saint louis, twelve oak street. it is far.",
    "plums, e.g. ripe ones, etc.": "plums, for example ripe ones, et cetera.",
    "i.e. No. 5 on Jan. 2": "that is number five on january two",
    "NHK, NASA, the US and the U.S. team": "n h k, nasa, the u s and the u s team",
    "an ATM of the ACLX": "an atm of the ay c l x",
    "B2B and mp3": "b two b and mp three",
    "a@b.com": "a at b dot com",
    "3 + 4 = 7": "three plus four equals seven",
    "naïve café, Straße, Øre": "naive cafe, strasse, ore",
    "“Hi” \u2013 she said; \u2018why\u2019?": "hi, she said, why?",
    "don\u2019t (ever) [say] 'that'": "don't ever say that",
    "Wait... what?! Well...": "wait, what? well.",
    "well-known -- and late": "well known, and late",
    "a\n b\t c 😀": "a b c",
}


@pytest.mark.parametrize("text", SPOKEN)
def test_normalize_writes_out(text):
    assert normalize(text) == SPOKEN[text]
    assert normalize(SPOKEN[text]) == SPOKEN[text]


@pytest.mark.parametrize("text", ["", "  \n", "?!", "😀", "'", "--"])
def test_normalize_refuses_text_without_words(text):
    with pytest.raises(ValueError, match="at least one word"):
        normalize(text)
    with pytest.raises(ValueError, match="at least one word"):
        sentences(text, 100)


@pytest.mark.parametrize("text", ["你好", "say Привет"])
def test_normalize_refuses_other_alphabets(text):
    with pytest.raises(ValueError, match="Latin letters"):
        normalize(text)


def test_normalize_gives_words_and_punctuation_for_any_characters():
    rng = random.Random(0)
    for _ in range(500):
        text = "x" + "".join(rng.choices("aA bBpmst .,'-$€%:0123456789/½°#&@\n\"()DrSt;!?", k=25))
        assert re.fullmatch(r"[a-z']+[,.?!]?( [a-z']+[,.?!]?)*", normalize(text)), text


def test_symbols_are_one_table_without_doubles():
    assert len(set(SYMBOLS)) == len(SYMBOLS) == 6 + 27 + 45 + 24
    assert SYMBOLS[0] == "_"
    ids = encode(to_symbols("hi, zyqx."))
    assert ids.dtype == np.int32
    assert [SYMBOLS[i] for i in ids] == ["HH", "AY1", ",", " ", "z", "y", "q", "x", "."]
    with pytest.raises(ValueError, match="'QQ'"):
        encode(["QQ"])


def test_symbols_spells_what_it_is_asked_to():
    assert to_symbols("the cat", spell=lambda word: word == "cat") == ["DH", "AH0", " ", "c", "a", "t"]
    assert to_symbols("cat's", spell=lambda word: True) == ["c", "a", "t", "'", "s"]


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("cat", "K AE1 T"),
        ("walrus's", "W AO1 L R AH0 S IH0 Z"),  # the possessive by what stands before it
        ("squid's", "S K W IH1 D Z"),
        ("trampolines", "T R AE2 M P AH0 L IY1 N Z"),
        ("trampolined", "T R AE2 M P AH0 L IY1 N D"),
        ("moonbase", "M UW1 N B EY1 S"),  # a compound
    ],
)
def test_pronounce(word, phones):
    assert pronounce(word) == tuple(phones.split())


def test_pronounce_does_not_know_what_is_no_word():
    assert pronounce("zyqx") is None
    assert pronounce("jaxspec") is None


def test_sentences_are_cut_at_stops_and_lines():
    text = "Dr. Ray came. Why? Go!\nNew line\n---\nIt was 3.5 km"
    expected = ["doctor ray came.", "why?", "go!", "new line.", "it was three point five kilometers."]
    assert sentences(text, 100) == expected


@pytest.mark.parametrize("limit", [20, 33, 60, 200])
def test_long_sentences_are_cut_to_the_limit(limit):
    text = "Hello there, my dear old friend, how are you in this wonderful world? " + "never ending words " * 40
    pieces = sentences(text, limit)
    assert all(len(to_symbols(piece)) <= limit and piece[-1] in ",.?!" for piece in pieces)
    assert re.findall(r"[a-z']+", " ".join(pieces)) == re.findall(r"[a-z']+", normalize(text))


def test_cuts_prefer_commas():
    assert sentences("one two three, four five six.", 18) == ["one two three,", "four five six."]


def test_a_word_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="at most 30 symbols"):
        sentences("so " + "z" * 40, 30)


def held_out():
    return files("jaxspec.text").joinpath("held_out.txt").read_text(encoding="utf-8").splitlines()


def words(text):
    return " ".join(re.findall(r"[a-z']+", text))


def template_pattern(template):
    parts = re.split(r"\{(\w+)\}", words_outside_slots(template))
    parts[1::2] = ["(?:" + "|".join(_SLOT_WORDS[slot]) + ")" for slot in parts[1::2]]
    return re.compile("".join(parts))


def words_outside_slots(template):
    return re.sub(r"[,.?!]", "", template)


def test_held_out_sentences_are_200_natural_ones():
    lines = held_out()
    assert len(lines) == 200
    assert len({normalize(line) for line in lines}) == 200
    counts = [len(line.split()) for line in lines]
    assert min(counts) >= 4
    assert max(counts) <= 14
    assert all(line[0].isupper() and line[-1] in ".?!" for line in lines)
    assert all(pronounce(word) for line in lines for word in words(normalize(line)).split())


def test_no_template_produces_a_held_out_sentence():
    patterns = [template_pattern(template) for template in TEMPLATES]
    assert any(pattern.fullmatch("what a quick fox") for pattern in patterns)  # the patterns do match what templates make
    said = [words(normalize(line)) for line in held_out()]
    assert not [text for text in said for pattern in patterns if pattern.fullmatch(text)]
