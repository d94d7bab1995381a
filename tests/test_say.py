"""The command line with the built-in voice: what a person does first, and what a person gets wrong."""

import json

import commands
import numpy as np
import pytest
import soundfile

from jaxspec.state import BONUS
from jaxspec.synthesis import builtin
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak
from jaxspec.text.held_out import held_out

pytestmark = pytest.mark.usefixtures("own_cache")
own_cache = commands.own_cache

TEXT = "The rain has stopped, so we can go."
KEYS = set(
    "audio_seconds lm_seconds codec_seconds compile_seconds rtf tokens rounds drafted accepted acceptance_rate tokens_per_round "
    "accepted_per_position verify seed".split()
)


def test_say_writes_a_wave_a_picture_and_the_figures(tmp_path):
    out, plot = tmp_path / "a.wav", tmp_path / "a.png"
    code, printed, _ = commands.run("say", TEXT, "--out", out, "--plot", plot, "--json")
    assert code == 0
    result = json.loads(printed.splitlines()[-1])
    assert set(result) >= KEYS
    wave, rate = soundfile.read(out)
    assert rate == 16_000
    assert len(wave) / rate == pytest.approx(result["audio_seconds"], abs=1e-3)
    assert 1.2 < len(wave) / rate < 5
    assert 0.01 < np.sqrt(np.mean(wave**2)) < 0.5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result["verify"] == "block-exact"
    assert 0 < result["accepted"] <= result["drafted"]
    assert result["acceptance_rate"] == pytest.approx(result["accepted"] / result["drafted"])
    assert result["tokens_per_round"] == pytest.approx(result["tokens"] / result["rounds"])
    assert sum(result["accepted_per_position"]) == pytest.approx(result["accepted"] / result["rounds"])
    assert len(result["accepted_per_position"]) == 3


def test_the_seed_decides_and_each_line_gets_a_file(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{TEXT}\n\n{TEXT}\n")

    def waves(folder, seed):
        arguments = ["say", "--file", texts, "--out-dir", tmp_path / folder, "--seed", seed, "--verify", "exact"]
        code, _, _ = commands.run(*arguments)
        assert code == 0
        return [path.read_bytes() for path in sorted((tmp_path / folder).glob("*.wav"))]

    first, again, other = waves("a", 1), waves("b", 1), waves("c", 2)
    assert len(first) == 2
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_a_drafter_by_name_changes_what_is_drafted_and_not_what_is_said(tmp_path):
    said = ["say", TEXT, "--verify", "exact", "--temperature", "0", "--json"]
    results = [commands.run(*said, "--out", tmp_path / f"{i}.npy", *more) for i, more in enumerate([[], ["--draft", "ngram"]])]
    own, ngram = (json.loads(printed) for _, printed, _ in results)
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    assert 0 < ngram["accepted"] < own["accepted"]


def test_one_text_is_a_text_and_no_text_is_an_empty_result():
    plain = Settings(verify="autoregressive")
    together, alone = speak(["Hi."], plain), speak("Hi.", plain)
    assert len(alone.utterances) == 1
    np.testing.assert_array_equal(alone.utterances[0].codes, together.utterances[0].codes)
    empty = speak([], plain)
    assert (empty.utterances, empty.counts["tokens"], empty.seconds["lm"]) == ([], 0, 0)


def test_long_text_is_cut_and_joined_and_voices_differ():
    long = speak(["One day we met. " * 3], Settings(verify="autoregressive")).utterances[0]
    short = speak(["One day we met."], Settings(verify="autoregressive")).utterances[0]
    assert len(long.wave) > 2 * len(short.wave)
    assert len(long.wave) == 640 * len(long.codes) == 640 * len(long.origin)
    other = speak(["One day we met."], Settings(verify="autoregressive", voice="rms")).utterances[0]
    assert not np.array_equal(short.codes, other.codes)


def test_no_draft_length_is_autoregressive():
    plain = speak([TEXT], Settings(verify="autoregressive"))
    none = speak([TEXT], Settings(verify="exact", draft_length=0))
    np.testing.assert_array_equal(plain.utterances[0].wave, none.utterances[0].wave)
    assert none.counts["verify"] == "autoregressive"
    assert none.counts["tokens_per_round"] == 1


def test_auto_tries_both_loops_and_goes_on_with_the_quicker():
    """What a batch says tells which loop it went through."""
    candidates, told = ("autoregressive", "coarse-grained"), []

    class Recording(Autotuner):
        def record(self, *what):
            told.append(what)
            super().record(*what)

    synthesizer = builtin.builtin()._replace(max_batch=2)
    spoken = speak(["One day we met."] * 8, Settings(verify="auto"), synthesizer, autotuner=Recording(candidates))
    assert spoken.counts["verify"] == "auto"
    assert len(spoken.counts["accepted_per_position"]) == 3
    replay = Autotuner(candidates)
    for turn, (batch, candidate, tokens, seconds) in enumerate(told):
        assert candidate == (candidates[turn] if turn < 2 else replay.choose(batch))
        pair = spoken.utterances[2 * turn : 2 * turn + 2]
        assert any((utterance.origin != BONUS).any() for utterance in pair) == (candidate == "coarse-grained")
        assert tokens == sum(len(utterance.codes) + 1 for utterance in pair)  # each ends with a stop
        replay.record(batch, candidate, tokens, seconds)
    assert len(told) == 4
    counts = spoken.counts
    drafting_rounds = counts["rounds"] - sum(tokens for _, candidate, tokens, _ in told if candidate == "autoregressive")
    assert sum(counts["accepted_per_position"]) == pytest.approx(counts["accepted"] / drafting_rounds)


def test_auto_does_not_draft_for_a_single_batch():
    spoken = speak(["Yes, we can."], Settings(verify="auto"))
    assert (spoken.counts["verify"], spoken.counts["drafted"], spoken.counts["accepted_per_position"]) == ("auto", 0, [])


def test_the_quickest_is_what_was_told_last():
    autotuner = Autotuner("ab")
    for candidate, tokens in (("a", 2), ("b", 1)):
        assert autotuner.choose(4) == candidate
        autotuner.record(4, candidate, tokens, 1.0)
    assert autotuner.choose(4) == "a"
    for _ in range(3):
        autotuner.record(4, "a", 1, 2.0)
    assert autotuner.choose(4) == "b"
    assert autotuner.choose(8) == "a"


@pytest.mark.slow
def test_coarse_graining_accepts_more_than_the_exact_rule():
    texts = held_out()[:20]  # some 750 rounds: the rates differ by .07, three standard errors
    exact = speak(texts, Settings(verify="exact")).counts
    coarse = speak(texts, Settings(verify="coarse-grained")).counts
    assert exact["exact_match_rate"] == 1
    assert coarse["acceptance_rate"] > exact["acceptance_rate"]
    assert coarse["exact_match_rate"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--out", "a.wav"], "text"),
        (["?!", "--out", "a.wav"], "?!"),
        ([TEXT, "--out", "a.wav", "--voice", "nobody"], "slt, rms"),
        ([TEXT, "--out", "missing/a.wav"], "missing/a.wav (No such file or directory)"),
        ([TEXT, "--out", "/proc/a.wav"], "expected a path that can be written to, got /proc/a.wav"),
        ([TEXT, "--out", "a.wav", "--plot", "a.pdf"], "ends in .png, got a.pdf"),
        ([TEXT, "--out", "a.wav", "--resume"], "--file for --out-dir"),
        ([TEXT, "--out", "a.wav", "--seed", "-1"], "a seed of 0 or more"),
        ([TEXT, "--out", "a.wav", "--top-p", "0"], "top_p"),
        ([TEXT, "--out", "a.wav", "--draft", "nowhere"], "nowhere"),
        ([TEXT, "--out", "a.mp4"], ".wav"),
        ([TEXT], "--out"),
        ([TEXT, "--out", "a.wav", "--draft-length", "-1"], "-1"),
        ([TEXT, "--out", "a.wav", "--threshold", "1.5"], "1.5"),
        ([TEXT, "--out", "a.wav", "--threshold", "-1"], "-1"),
        ([TEXT, "--out", "a.wav", "--beta", "-0.1"], "-0.1"),
        ([TEXT, "--out", "a.wav", "--beta", "2"], "0 (exact) to 1"),
        ([TEXT, "--out", "a.wav", "--temperature", "-1"], "temperature"),
        ([TEXT, "--out", "a.wav", "--verify", "maybe"], "maybe"),
        (["--file", "none.txt", "--out-dir", "out"], "none.txt"),
        (["--file", "none.txt"], "--out-dir"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"old")
    code, _, err = commands.run("say", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert (tmp_path / "a.wav").read_bytes() == b"old"
    assert not any(path.name.startswith(".a-") for path in tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--sentences", "0"], ["--sentences", "201"], ["--seeds", "0"]])
def test_an_impossible_evaluation_is_refused(tmp_path, monkeypatch, arguments):
    code, _, err = commands.run("evaluate", "--out-dir", tmp_path / "out", *arguments)
    assert code == 2
    assert "sentences" in err
    assert not (tmp_path / "out").exists()
