"""Predicted naturalness: the real models on short sounds, and what happens where they are missing."""

import shutil
import sys

import numpy as np
import pytest

from jaxspec.evaluate import naturalness, recognize, requirements
from jaxspec.evaluate.naturalness import OPTIONAL
from jaxspec.train.voice.corpus import record

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def tone():
    """A second of harmonics of 120 Hz, in four syllables."""
    time = np.arange(RATE_HZ) / RATE_HZ
    harmonics = np.arange(1, 30)[:, None]
    return (np.sin(4 * np.pi * time) ** 2 * (np.sin(2 * np.pi * 120 * harmonics * time) / harmonics).sum(0) / 9).astype(
        np.float32
    )


def noisy(wave):
    return wave + np.random.default_rng(0).normal(0, 0.03, len(wave)).astype(np.float32)


@pytest.fixture
def without_distill_mos(monkeypatch):
    monkeypatch.setitem(sys.modules, "distillmos", None)


@pytest.fixture
def distill_mos(monkeypatch):
    """The real model; a stand-in for torchaudio, which its package imports and only its command calls."""
    monkeypatch.setitem(sys.modules, "torchaudio", sys)
    for name in OPTIONAL[:2]:
        pytest.importorskip(name)


def test_dnsmos_hears_noise_at_any_level(tone, without_distill_mos):
    clean, hissing = naturalness.naturalness([tone]), naturalness.naturalness([noisy(tone)])
    assert clean.keys() == {"dnsmos", "dnsmos_signal", "dnsmos_background"}
    assert all(0.5 < value < 5 for found in (clean, hissing) for value in found.values())
    assert clean["dnsmos_background"] > hissing["dnsmos_background"] + 0.5
    assert naturalness.naturalness([0.01 * tone]) == pytest.approx(clean, abs=1e-3)


def test_a_wave_that_is_longer_than_the_window_is_judged_as_a_whole(tone):
    clean = np.tile(tone, 11)
    hissing = np.where(np.arange(len(clean)) < 9.2 * RATE_HZ, clean, noisy(clean))
    assert naturalness.dnsmos(clean)[2] > naturalness.dnsmos(hissing)[2]


def test_distill_mos_of_a_tone_is_bad_and_nothing_is_printed(tone, distill_mos, capsys):
    assert naturalness.has_distill_mos()
    assert 1 < naturalness.distill_mos(tone) < 2
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_speech_is_more_natural_than_the_same_with_noise(distill_mos):
    speech = record("The old man lost the key.", "slt").signal / np.float32(32768)
    clean, hissing = naturalness.naturalness([speech]), naturalness.naturalness([noisy(speech)])
    assert len(clean) == 4
    assert all(clean[name] > hissing[name] + 0.2 for name in ("dnsmos", "dnsmos_background", "distill_mos"))


def test_distill_mos_is_a_mean_beside_dnsmos_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(naturalness, "dnsmos", lambda wave: (float(np.abs(wave).max()), 2.0, 3.0))
    monkeypatch.setattr(naturalness, "distill_mos", len)
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, sys)
    found = naturalness.naturalness([np.ones(16_000), np.ones(8000)])
    assert found == pytest.approx({"dnsmos": 0.5, "dnsmos_signal": 2, "dnsmos_background": 3, "distill_mos": 12_000})
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
        assert "distill_mos" not in naturalness.naturalness([np.ones(16_000)])
        monkeypatch.setitem(sys.modules, name, sys)


@pytest.mark.parametrize("waves", [[], [np.zeros(RATE_HZ, np.float32)], [np.full(RATE_HZ, np.nan, np.float32)]])
def test_nothing_silence_and_nan_are_refused(waves):
    with pytest.raises(ValueError, match=r"expected (one wave or more|waves)"):
        naturalness.naturalness(waves)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    with pytest.raises(ImportError, match=r"expected speechmos to be installed, got .*pip install 'jaxspec\[eval\]'"):
        naturalness.naturalness([np.ones(RATE_HZ, np.float32)])


def test_a_distill_mos_that_cannot_be_imported_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(requirements.shutil, "which", lambda name: name)
    for name in (*requirements.MODULES, *recognize.PACKAGES.values(), *OPTIONAL):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "distillmos.py").write_text("")
    requirements.check("pocketsphinx")
    (tmp_path / "distillmos.py").write_text("raise OSError('Could not load this library')")
    with pytest.raises(RuntimeError, match="distillmos to import, got OSError: Could not load this library: install torchaudio"):
        requirements.check("pocketsphinx")
