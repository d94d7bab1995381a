"""Speech in chunks: joined, they are what ``speak`` gives, and they come while the rest is decoded."""

import dataclasses

import commands
import numpy as np
import pytest

from jaxspec.synthesis import builtin, stream
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import Tally, speak
from jaxspec.synthesis.slots import Row, Slots
from jaxspec.synthesis.windows import Windows

pytestmark = pytest.mark.usefixtures("own_cache")
own_cache = commands.own_cache

TEXTS = ["One day we met. The rain has stopped, so we can go.", "Hi."]


def joined(chunks, count):
    """The chunks of each text as one (codes, origin, wave)."""
    parts = [[chunk for chunk in chunks if chunk.text == index] for index in range(count)]
    return [tuple(np.concatenate([getattr(c, f) for c in some]) for f in ("codes", "origin", "wave")) for some in parts]


@pytest.mark.parametrize("verify", ["exact", "autoregressive"])
def test_joined_chunks_are_what_speak_gives(verify):
    settings, tally = Settings(verify=verify, seed=3), Tally()
    whole = speak(TEXTS, settings)
    chunks = list(stream.stream(TEXTS, settings, tally=tally))
    assert [chunk.text for chunk in chunks] == sorted(chunk.text for chunk in chunks)
    assert len(chunks) > 5
    assert len(chunks[0].codes) == 10
    for (codes, origin, wave), utterance in zip(joined(chunks, 2), whole.utterances, strict=True):
        np.testing.assert_array_equal(codes, utterance.codes)
        np.testing.assert_array_equal(origin, utterance.origin)
        np.testing.assert_allclose(wave, utterance.wave, atol=1e-4)
    assert tally.counts(verify, 3) == whole.counts


def test_the_first_chunk_comes_before_the_last_code_is_decoded(monkeypatch):
    rounds = []
    advance = Slots.advance
    monkeypatch.setattr(Slots, "advance", lambda self, count: (rounds.append(count), advance(self, count))[1])
    chunks = stream.stream(TEXTS[0], Settings(verify="autoregressive"), first_codes=4)
    next(chunks)
    early = sum(rounds)
    assert 4 + 6 <= early <= 4 + 6 + 2  # the codec looks 6 codes ahead, and the device is one round ahead
    assert len(list(chunks)) > 3
    assert sum(rounds) > 3 * early


def test_a_codec_without_bounds_and_frames_of_several_codes():
    """Windows with fakes: nothing before the end without bounds; and whole frames."""
    voice = builtin.builtin()
    row = Row(np.arange(30, dtype=np.int32), np.zeros(30, np.int8))
    finished = dataclasses.replace(row, stop_reason=1)
    unbounded = Windows(voice._replace(context_frames=(None, None)))
    assert unbounded.take(row) == []
    (window,) = unbounded.take(finished)
    assert (window.first, window.last, len(window.codes)) == (0, 30, 30)

    def frames(ids):
        at = np.arange(len(ids) // 7 * 7).reshape(-1, 7)
        return ids[at], at

    pairs = Windows(voice._replace(codes=frames, context_frames=(1, 1)))
    taken = [*pairs.take(row), *pairs.take(finished)]
    assert [(len(w.codes), w.first, w.last, w.origin.shape) for w in taken] == [(3, 0, 2, (2, 7)), (3, 1, 3, (2, 7))]


def test_no_window_is_longer_than_it_may_be():
    windows, row = Windows(builtin.builtin(), 10), Row(np.zeros(240, np.int32), np.zeros(240, np.int8))
    early = windows.take(row)
    late = windows.take(dataclasses.replace(row, stop_reason=1))
    assert [w.last - w.first for w in early + late] == [10, 20, 40, 60, 60, 50]
    assert max(len(w.codes) for w in early + late) == 72


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="one word to speak"):
        stream.stream(["Hi.", " "])
    with pytest.raises(ValueError, match="expected a codec"):
        stream.stream("Hi.", None, builtin.builtin()._replace(decode=None))
    with pytest.raises(ValueError, match="at least 1 code"):
        stream.stream("Hi.", first_codes=0)
    assert list(stream.stream([])) == []
