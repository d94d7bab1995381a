"""Recordings: what is read, and what is refused in one sentence."""

import numpy as np
import pytest
import soundfile

from jaxspec.audio.files import check_reference, read

RATE = 16_000
TONE = (0.3 * np.sin(2 * np.pi * 220 * np.arange(2 * RATE) / RATE)).astype(np.float32)


@pytest.mark.parametrize(("kind", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
def test_the_mean_of_the_channels_is_read(tmp_path, kind, error):
    soundfile.write(tmp_path / f"a.{kind}", np.stack([TONE, TONE / 3], 1), RATE)
    wave, rate = read(tmp_path / f"a.{kind}")
    assert (rate, wave.dtype, wave.ndim) == (RATE, np.float32, 1)
    inside = slice(4000, 28_000)
    if kind == "mp3":  # whose encoder delays
        assert wave[inside].std() == pytest.approx((TONE / 1.5)[inside].std(), rel=error)
    else:
        np.testing.assert_allclose(wave[inside], (TONE / 1.5)[inside], atol=error)


@pytest.mark.parametrize(("subtype", "rate"), [("PCM_16", 44_100), ("PCM_24", 48_000), ("FLOAT", 24_000), ("DOUBLE", 8000)])
def test_samples_of_any_width_are_in_the_same_range(tmp_path, subtype, rate):
    soundfile.write(tmp_path / "a.wav", TONE, rate, subtype=subtype)
    wave, got = read(str(tmp_path / "a.wav"))
    assert got == rate
    np.testing.assert_allclose(wave, TONE, atol=1e-4)


def text(path):
    path.write_text("this is not sound")


def corrupt(path):
    soundfile.write(path, TONE, RATE, format="MP3")
    path.write_bytes(b"ID3" + bytes(200) + path.read_bytes()[2000:2100])


def empty(path):
    soundfile.write(path, TONE[:0], RATE, format="WAV")


def not_a_number(path):
    soundfile.write(path, np.where(np.arange(len(TONE)) == 9, np.float32(np.nan), TONE), RATE, format="WAV", subtype="FLOAT")


BROKEN = {
    "missing": (lambda path: None, OSError, "No such file"),
    "a folder": (lambda path: path.mkdir(), OSError, "directory"),
    "of no bytes": (lambda path: path.write_bytes(b""), ValueError, "expected a wav, flac, mp3 or ogg file"),
    "a text": (text, ValueError, "expected a wav, flac, mp3 or ogg file"),
    "a corrupt mp3": (corrupt, ValueError, "expected a"),
    "empty": (empty, ValueError, "without samples"),
    "not finite": (not_a_number, ValueError, "NaN or infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said(tmp_path, name):
    make, error, message = BROKEN[name]
    make(tmp_path / "a.bin")
    with pytest.raises(error, match=message) as raised:
        read(tmp_path / "a.bin")
    assert str(tmp_path / "a.bin") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("count", [RATE // 2, 2 * RATE, 30 * RATE])
def test_a_good_reference_passes(count):
    check_reference(np.resize(TONE, count), RATE)


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (TONE[: RATE // 20], RATE, "0.5 s or more, got 0.05 s"),
        (np.resize(TONE, 31 * RATE), RATE, "30 s or less, got 31.00 s"),
        (TONE, 8000, "16000 Hz or more, got 8000 Hz"),
        (1e-4 * TONE, RATE, "louder than -60 dB, got -93 dB"),
        (0 * TONE, RATE, "louder than -60 dB"),
        (0 * TONE + 0.5, RATE, "louder than -60 dB"),
    ],
)
def test_what_cannot_be_a_reference_is_said(wave, rate, message):
    with pytest.raises(ValueError, match=message):
        check_reference(wave, rate)
    with pytest.raises(ValueError, match="expected a reference of 5 s or more"):
        check_reference(TONE, RATE, seconds=(5, 10))
