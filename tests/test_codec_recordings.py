"""Codecs on recordings of flite: the right lengths and finite sound, and the built-in voice's codes as its corpus has them."""

import shutil

import numpy as np
import pytest
import test_contract_codec

from jaxspec.audio.resample import resample
from jaxspec.codec import builtin as codecs
from jaxspec.codec.padding import decode_rows, encode_rows
from jaxspec.models import builtin
from jaxspec.train.voice import codec as training
from jaxspec.train.voice import corpus

pytestmark = pytest.mark.slow  # flite is no package: pytest -m slow tests/test_codec_recordings.py
TEXTS = {"The rain has stopped.": "slt", "Yes.": "rms", "A basket of eggs, and together we went home.": "slt"}


@pytest.fixture(scope="module")
def recordings():
    if not shutil.which("flite"):
        pytest.skip("flite is not installed")
    return [corpus.record(text, voice) for text, voice in TEXTS.items()]


@pytest.mark.parametrize("name", test_contract_codec.ENCODING)
def test_recordings_come_back_as_long_as_they_were(recordings, name):
    codec, params, books, condition = test_contract_codec.case(name)
    rate = codec.encode_rate_hz or codec.sample_rate_hz
    waves = [resample(one.signal.astype(np.float32) / 32768, corpus.SAMPLE_RATE_HZ, rate) for one in recordings]
    codes = encode_rows(codec, params, waves)
    condition = condition if condition is None else test_contract_codec.rows_of(condition, slice(0, len(waves)))
    sounds = decode_rows(codec, params, codes, condition)
    for wave, row, sound in zip(waves, codes, sounds, strict=True):
        assert row.shape[1] == books
        assert len(np.unique(row)) > 1
        assert abs(len(row) - len(wave) * codec.frame_rate_hz / rate) <= 1 + 1e-6
        assert len(sound) == len(row) * codec.sample_rate_hz / codec.frame_rate_hz
        assert np.isfinite(sound).all()


def test_the_built_in_codes_are_those_of_the_corpus(recordings, tmp_path):
    voice = builtin.load()
    (tmp_path / "corpus").mkdir()
    corpus.write_shard(tmp_path / "corpus" / "00000.npz", recordings)
    assert list(training.encode_shards(tmp_path / "corpus", tmp_path / "codes", voice.codec_params, voice.codec))
    model = codecs.codec(voice.codec)
    for one, kept in zip(recordings, corpus.read_shard(tmp_path / "codes" / "00000.npz"), strict=True):
        (codes,) = encode_rows(model, voice.codec_params, [one.signal.astype(np.float32) / 32768])
        np.testing.assert_array_equal(codes[:, 0], kept.signal)
