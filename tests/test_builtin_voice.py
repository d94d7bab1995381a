"""The file of the built-in voice: damage is named, and what is saved comes back."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from jaxspec.models import builtin as voices
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak

TEXT = "The rain has stopped."


@pytest.mark.parametrize("damage", ["cut", "noise", "missing", "other"])
def test_a_damaged_voice_file_is_said_to_be_one(tmp_path, damage):
    path = tmp_path / "voice.safetensors"
    shutil.copy(voices.BUILTIN, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 100)
    elif damage == "missing":
        path.unlink()
    else:
        voices.weights.save(path, {"a": np.ones(3)}, {"not": "a voice"})
    with pytest.raises(ValueError, match=r"voice\.safetensors"):
        voices.load(path)


def test_weights_that_are_not_finite_are_refused_when_read_and_when_met(tmp_path):
    voice = voices.load()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, voice.target_params)
    with pytest.raises(ValueError, match="finite logits"):
        speak([TEXT], Settings(verify="autoregressive"), builtin.synthesizer(voice._replace(target_params=broken)))
    voices.save(tmp_path / "voice.safetensors", voice._replace(target_params=broken))
    with pytest.raises(ValueError, match="finite weights"):
        voices.load(tmp_path / "voice.safetensors")


def test_a_voice_comes_back_as_it_was_saved(tmp_path):
    voice = voices.load()
    voices.save(tmp_path / "voice.safetensors", voice)
    again = voices.load(tmp_path / "voice.safetensors")
    assert dataclasses.astuple(again.target) == dataclasses.astuple(voice.target)
    jax.tree.map(np.testing.assert_array_equal, voice.target_params, again.target_params)
    assert voices.BUILTIN.stat().st_size < 32e6
