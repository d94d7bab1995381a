"""The file of the built-in voice: damage is named, and what is saved comes back."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.common import records
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
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
    assert again.draft == voice.draft
    jax.tree.map(np.testing.assert_array_equal, voice.draft_params, again.draft_params)
    assert voices.digest(again) == voices.digest(voice) == records.from_json(DraftDescription, voice.draft).target
    assert voices.BUILTIN.stat().st_size < 64e6


def test_a_voice_without_a_draft_speaks_code_by_code(tmp_path):
    voices.save(tmp_path / "voice.safetensors", voices.load()._replace(draft=None, draft_params=None))
    alone = builtin.synthesizer(voices.load(tmp_path / "voice.safetensors"))
    assert alone.drafter is None
    result = speak([TEXT], Settings(max_codes=20), alone)
    assert result.counts["tokens"] == result.counts["rounds"]
    with pytest.raises(ValueError, match="expected a draft"):
        speak([TEXT], Settings(verify="exact"), alone)


def test_a_voice_of_the_first_format_keeps_its_draft(tmp_path):
    """There, the description of the draft was the shape of a smaller model."""
    voice, path = voices.load(), tmp_path / "voice.safetensors"
    shape = transformer.Config(voice.target.input_tables, voice.target.vocab, 16, 1, 2, 1, 8, 24)
    params = transformer.init_params(jax.random.key(0), shape)
    voices.save(path, voice._replace(draft=dataclasses.asdict(shape), draft_params=jax.device_get(params)))
    drafter = builtin.synthesizer(voices.load(path)).drafter
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), drafter.params, params)
    assert drafter.make(3).length == 3
