"""Speech in chunks: joined, they are what ``speak`` gives, and they come while the rest is decoded."""

import contextlib
import dataclasses
import io
import json
import wave as wave_files
from unittest import mock

import commands
import jax
import numpy as np
import pytest
import soundfile

from jaxspec.audio.pcm import pcm16, wav_header
from jaxspec.commands import main
from jaxspec.commands.streaming import say_stream
from jaxspec.common import compilation_cache
from jaxspec.common.compilation_cache import use_compilation_cache
from jaxspec.synthesis import builtin, stream
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.decoding import resolve, tokens_of
from jaxspec.synthesis.pipeline import Tally, speak
from jaxspec.synthesis.slots import Row, Slots, row_request
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


def test_another_process_traces_nothing_anew(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache(tmp_path)
    spoken = []
    for export in (jax.export.export, lambda function: pytest.fail("traced")):
        monkeypatch.setattr(compilation_cache, "_programs", {})  # as in another process
        monkeypatch.setattr(jax.export, "export", export)
        spoken.append(np.concatenate([chunk.wave for chunk in stream.stream("Hi.", Settings(verify="autoregressive"))]))
    jax.config.update("jax_compilation_cache_dir", before)
    assert len(list((tmp_path / "jaxspec-traced").iterdir())) == 4  # keys, admission, rounds, and the codec
    np.testing.assert_array_equal(*spoken)


def test_rows_computed_in_batches_of_the_size_in_use_are_the_same():
    """Pieces that arrive and leave in four slots, by ones, twos and fours."""
    voice, settings = builtin.builtin(), Settings(verify="exact", temperature=0.0)
    pieces = [piece for text in ("Hi. Ho. No.", "One day.", "Go on.") for piece in voice.pieces(text)]
    requests, decoding = voice.requests(pieces, settings), resolve(voice, settings)
    keys = jax.random.split(jax.random.key(0), 8)
    slots = Slots(voice, decoding, 4, 114 + 240 + 4, 1, sizes=(1, 2))
    waiting, rows, sizes = [row_request(voice, requests, i, keys[i : i + 1], 64) for i in range(len(pieces))], [], []
    while waiting or any(slots.rows) or slots.unread:
        for _ in range(min(len(waiting), max(len(rows), 1), slots.rows.count(None))):
            rows.append(slots.admit(waiting.pop(0)))
        sizes.append(slots.advance(3))
        list(slots.read())
    assert set(sizes) == {1, 2, 4}
    together = tokens_of(pieces, keys, voice, settings, decoding)
    for row, tokens, length in zip(rows, together.tokens, together.length, strict=True):
        np.testing.assert_array_equal(row.tokens, tokens[:length])


def test_a_codec_without_bounds_and_frames_of_several_codes():
    """Windows with fakes: nothing before the end without bounds; and whole frames."""
    voice = builtin.builtin()
    row = Row(np.arange(30, dtype=np.int32), np.zeros(30, np.int8))
    finished = dataclasses.replace(row, stop_reason=1)
    unbounded = Windows(voice._replace(context_frames=(None, None)), Settings())
    assert unbounded.take(row) == []
    (window,) = unbounded.take(finished)
    assert (window.first, window.last, len(window.codes)) == (0, 30, 30)

    def frames(ids):
        at = np.arange(len(ids) // 7 * 7).reshape(-1, 7)
        return ids[at], at

    pairs = Windows(voice._replace(codes=frames, context_frames=(1, 1)), Settings())
    taken = [*pairs.take(row), *pairs.take(finished)]
    assert [(len(w.codes), w.first, w.last, w.origin.shape) for w in taken] == [(3, 0, 2, (2, 7)), (3, 1, 3, (2, 7))]


def test_no_window_is_longer_than_it_may_be():
    windows, row = Windows(builtin.builtin(), Settings(), 10), Row(np.zeros(240, np.int32), np.zeros(240, np.int8))
    early = windows.take(row)
    late = windows.take(dataclasses.replace(row, stop_reason=1))
    assert [w.last - w.first for w in early + late] == [10, 20, 40, 60, 60, 50]
    assert max(len(w.codes) for w in early + late) == 74


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="one word to speak"):
        stream.stream(["Hi.", " "])
    with pytest.raises(ValueError, match="expected a codec"):
        stream.stream("Hi.", None, builtin.builtin()._replace(decode=None))
    with pytest.raises(ValueError, match="at least 1 code"):
        stream.stream("Hi.", first_codes=0)
    assert list(stream.stream([])) == []


def test_say_streams_to_a_file_and_to_standard_output(tmp_path, monkeypatch):
    said = ["say", TEXTS[0], "--stream", "--verify", "exact", "--seed", "3", "--json"]
    code, printed, shown = commands.run(*said, "--out", tmp_path / "a.wav")
    assert code == 0
    result = json.loads(printed)
    assert "first audio after" in shown
    assert 0 < result["time_to_first_audio_s"] < 60
    assert result["underruns"] >= 0
    assert result["gap_p50_s"] <= result["gap_p95_s"]
    whole = speak(TEXTS[0], Settings(verify="exact", seed=3)).utterances[0].wave
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 16_000
    np.testing.assert_allclose(wave, whole, atol=2e-4)
    assert result["audio_seconds"] == pytest.approx(len(wave) / rate, abs=1e-3)

    sound, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with (
        mock.patch("sys.stdout", sound),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", ["jaxspec", *said, "--format", "pcm"]),
    ):
        main.main()
    np.testing.assert_array_equal(
        np.frombuffer(sound.buffer.getvalue(), "<i2"), soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
    )
    assert json.loads(err.getvalue().splitlines()[-1])["tokens"] == result["tokens"]


def test_a_player_that_is_closed_ends_the_stream(tmp_path, monkeypatch):
    with (tmp_path / "player").open("wb") as player:
        closed = mock.Mock(fileno=player.fileno, buffer=mock.Mock(write=mock.Mock(side_effect=BrokenPipeError)))
        monkeypatch.setattr("sys.stdout", closed)
        tally, timing = say_stream(TEXTS[1], Settings(), builtin.builtin(), None, False)
    assert (tally.generations, timing.figures()["time_to_first_audio_s"]) == ([], 0.0)


@pytest.mark.parametrize(
    "arguments", ["--stream --plot a.png", "--stream --out a.mp3", "--stream --format flac", "--format pcm --out a.wav"]
)
def test_what_a_stream_cannot_do_is_refused(arguments):
    code, printed, error = commands.run("say", "Hi.", *arguments.split())
    assert (code, printed) == (2, "")
    assert "--stream" in error


def test_the_header_of_a_stream_is_one_that_readers_know():
    samples = pcm16(np.array([0, 0.5, -2], np.float32))
    for header in (wav_header(24_000), wav_header(24_000, len(samples))):
        with wave_files.open(io.BytesIO(header + samples)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
            assert file.readframes(3) == samples
    assert header == soundfile_header(samples)


def soundfile_header(samples):
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(samples, "<i2"), 24_000, format="WAV", subtype="PCM_16")
    return file.getvalue()[:44]
