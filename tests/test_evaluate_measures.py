"""The measures: error rates by hand, recognition of silence, similarity of a sound to itself."""

import subprocess
import sys

import numpy as np
import pytest

from jaxspec.evaluate.recognize import PACKAGES, error_rates, plain, transcribe
from jaxspec.evaluate.similarity import embed, similarity
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak


def buzz(pitch_hz, seconds=1.5, seed=0):
    """A voice-like sound: harmonics under a slowly moving formant, at 16 kHz."""
    time = np.arange(int(16_000 * seconds)) / 16_000
    harmonics = np.arange(1, 30)[:, None]
    formant = 700 + 300 * np.sin(2 * np.pi * 3 * time)
    weight = np.exp(-(((harmonics * pitch_hz - formant) / 400) ** 2)) + 0.2
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time))
    return (0.1 * (weight * np.sin(2 * np.pi * harmonics * pitch_hz * time)).sum(0) + noise).astype(np.float32)


def test_error_rates_by_hand():
    rates = error_rates(["The cat sat down.", "a b"], ["the cat sit", "a b c"])
    assert rates.wer == pytest.approx(3 / 6)  # one substitution, one deletion, one insertion
    assert rates.cer == pytest.approx((1 + 5 + 2) / (16 + 3))
    assert rates.wer_interval == pytest.approx((0.5, 0.5))  # both sentences have one half
    assert rates.cer_interval[0] < rates.cer < rates.cer_interval[1]


def test_error_rates_normalise_numbers_and_abbreviations():
    said = ["at ten thirty doctor lee paid five dollars", "well known ones"]
    assert error_rates(["At 10:30, Dr. Lee paid $5!", "Well-known ones..."], said).wer == 0


@pytest.mark.parametrize("text", ["", "?!", "你好"])
def test_a_text_that_cannot_be_spoken_has_no_words(text):
    assert plain(text) == ""


def test_an_empty_transcript_is_all_errors():
    assert error_rates(["one two"], [""]).wer == 1


def test_the_interval_has_the_width_of_the_binomial_distribution():
    rng = np.random.default_rng(1)
    hypotheses = ["a b c d " + ("x" if wrong else "e") for wrong in rng.random(400) < 0.5]
    rates = error_rates(["a b c d e"] * 400, hypotheses)
    low, high = rates.wer_interval
    assert low < rates.wer < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)  # sd of a sentence's rate is .1, 400 sentences
    assert error_rates(["a b c d e"] * 400, hypotheses) == rates


def test_repeated_sentences_do_not_narrow_the_interval():
    hypotheses = ["a b", "a x", "a b", "y x"]
    assert error_rates(["a b"] * 4, hypotheses) == error_rates(["a b"] * 4, hypotheses * 3)


@pytest.mark.parametrize(("references", "hypotheses"), [([], []), (["a"], []), (["a", "b"], ["a", "b", "a"])])
def test_error_rates_refuse_hypotheses_that_are_no_multiple_of_the_references(references, hypotheses):
    with pytest.raises(ValueError, match="multiple of one or more references"):
        error_rates(references, hypotheses)


@pytest.mark.parametrize("recognizer", PACKAGES)
def test_silence_has_an_empty_transcript(recognizer):
    pytest.importorskip(PACKAGES[recognizer])
    assert transcribe([np.zeros(16_000, np.float32), np.zeros(0, np.float32)], recognizer) == ["", ""]
    assert transcribe([], recognizer) == []


@pytest.mark.parametrize("recognizer", PACKAGES)
def test_transcripts_keep_the_order_and_are_independent_of_the_level(recognizer):
    pytest.importorskip(PACKAGES[recognizer])
    waves = [buzz(120, 0.5), np.zeros(1600, np.float32), 0.1 * buzz(120, 0.5), buzz(200, 0.05)]
    texts = transcribe(waves, recognizer, processes=2)
    assert len(texts) == 4
    assert texts[1] == ""
    assert texts[0] == texts[2]


def test_transcribe_refuses_nan():
    with pytest.raises(ValueError, match="finite samples"):
        transcribe([np.array([0.0, np.nan], np.float32)], "pocketsphinx")


@pytest.mark.parametrize("recognizer", PACKAGES)
def test_the_recogniser_process_imports_neither_jax_nor_the_other(recognizer):
    pytest.importorskip(PACKAGES[recognizer])
    from jaxspec.evaluate import listen

    (other,) = PACKAGES.keys() - {recognizer}
    code = f"import sys, runpy; sys.stdin, sys.argv[1:] = open('/dev/null'), [{recognizer!r}]"
    code += f"; runpy.run_path({listen.__file__!r}, run_name='__main__'); found = set(sys.modules)"
    code += f"; assert {PACKAGES[recognizer]!r} in found and not {{'jax', 'jaxspec', {PACKAGES[other]!r}}} & found"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("recognizer", PACKAGES)
def test_speech_is_recognised(recognizer):
    pytest.importorskip(PACKAGES[recognizer])
    sentence = "The old man lost the key of the house."
    result = speak([sentence], Settings(verify="autoregressive"))
    assert error_rates([sentence], transcribe([result.utterances[0].wave], recognizer)).wer < 0.4


def test_embeddings_are_independent_of_the_level():
    low, high = buzz(100), buzz(230)
    found = embed([low, 0.3 * low, high], 16_000)
    assert found.shape == (3, 256)
    np.testing.assert_allclose(similarity(found, found), 1, atol=1e-5)
    assert similarity(found[0], found[1]) > 0.99 > similarity(found[0], found[2])


@pytest.mark.parametrize("wave", [np.zeros(16_000, np.float32), np.full(16_000, np.nan, np.float32)])
def test_embed_refuses_silence_and_nan(wave):
    with pytest.raises(ValueError, match="finite samples that are not all 0"):
        embed([wave], 16_000)
