"""Sound in each format, in parts: decoded again, it is the wave."""

import io

import numpy as np
import pytest

from jaxspec.audio.resample import Resampler, resample
from jaxspec.serve import formats

RATE = 16_000
WAVE = (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(1.3 * RATE)) / RATE)).astype(np.float32)
PARTS = np.split(WAVE, [3, 3, 700, 9000, 9001])


@pytest.mark.parametrize("rates", [(16_000, 24_000), (24_000, 16_000), (16_000, 16_000), (44_100, 24_000)])
def test_resampling_in_parts_is_resampling_the_whole(rates):
    resampler = Resampler(*rates)
    made = np.concatenate([*(resampler.add(part) for part in PARTS), resampler.end()])
    np.testing.assert_allclose(made, resample(WAVE, *rates), atol=1e-6)


@pytest.mark.parametrize("name", formats.MEDIA_TYPES)
@pytest.mark.parametrize("speed", [1, 2, 0.3])
def test_decoded_again_it_is_the_wave(name, speed):
    av = pytest.importorskip("av")
    formats.check(name, speed)
    encoder = formats.Encoder(name, RATE, speed)
    parts = [encoder.add(part) for part in PARTS]
    content = b"".join([*parts, encoder.end()])
    if speed == 1:
        assert sum(map(len, parts)) > 0.4 * len(content)  # it comes while the rest is made
    rate = {"pcm": 24_000, "opus": 48_000}.get(name, RATE)
    if name == "pcm":
        got = np.frombuffer(content, "<i2") / 32767
    else:
        with av.open(io.BytesIO(content)) as container:
            assert container.streams.audio[0].rate == rate
            got = np.concatenate([frame.to_ndarray().ravel().astype(float) for frame in container.decode(audio=0)])
            got /= np.abs(got).max() / 0.4
    assert len(got) / rate == pytest.approx(len(WAVE) / RATE / speed, abs=0.12)
    middle = got[len(got) // 4 : 3 * len(got) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) * rate / len(middle) == pytest.approx(440, abs=5)


@pytest.mark.parametrize("name", formats.MEDIA_TYPES)
def test_no_sound_is_no_error(name):
    pytest.importorskip("av")
    for encoder in (formats.Encoder(name, RATE), formats.Encoder(name, RATE, 2.0)):
        assert len(encoder.add(np.zeros(0, np.float32)) + encoder.end()) < 10_000


def test_what_cannot_be_made_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="among mp3, opus"):
        formats.check("m4a", 1)
    for speed in (0.2, 5, float("nan")):
        with pytest.raises(ValueError, match="speed from"):
            formats.check("wav", speed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    formats.check("wav", 1)
    for name, speed in (("mp3", 1), ("wav", 2)):
        with pytest.raises(ValueError, match="PyAV"):
            formats.check(name, speed)
