"""The prose of the corpus: it is the same for the same seed, fits the model, and has the clauses it is there for."""

import itertools

import pytest

from jaxspec.text.held_out import held_out
from jaxspec.text.symbols import to_symbols
from jaxspec.train.voice import corpus, prose

WORDS = "garden walked walking slowly tables golden useful active singing quickly river hats opened loudly bright stones".split()


@pytest.fixture(autouse=True)
def small_dictionary(monkeypatch):
    for module in (prose, corpus.sentences.__globals__):
        words = WORDS, list(range(1, len(WORDS) + 1))
        if isinstance(module, dict):
            monkeypatch.setitem(module, "dictionary", lambda words=words: words)
        else:
            monkeypatch.setattr(module, "dictionary", lambda words=words: words)


def take(count, *arguments):
    return list(itertools.islice(prose.prose(*arguments), count))


def test_pieces_fit_and_are_the_same_for_the_same_seed():
    pieces = take(300, 1, 112)
    assert pieces == take(300, 1, 112) != take(300, 2, 112)
    assert max(len(to_symbols(piece)) for piece in pieces) <= 112
    assert max(len(to_symbols(piece)) for piece in take(300, 1, 40)) <= 40
    assert all(piece[-1] in ".?!," for piece in pieces)
    assert not any(character in piece for piece in pieces for character in "{}|_")


def test_most_pieces_have_clauses_and_every_rule_is_used():
    pieces = take(2000, 3, 112)
    assert sum("," in piece[:-1] for piece in pieces) > 1000
    for sign in ("?", "!", "said", "who", "years old", "o'clock", "nineteen", "captain"):
        assert any(sign in piece for piece in pieces), sign


def test_texts_to_record_mix_both_kinds_and_hold_nothing_out():
    some = list(itertools.islice(corpus.texts(5, 0.5, 112), 2000))
    assert some == list(itertools.islice(corpus.texts(5, 0.5, 112), 2000))
    running = set(itertools.islice(prose.prose(5, 112), 2000))
    assert 0.4 < sum(text in running for text in some) / len(some) < 0.6
    assert not {text.lower() for kind in ("sentences", "prose") for text in held_out(kind)} & set(some)
