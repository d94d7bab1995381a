"""The script that builds the voice: what is missing, damaged or of another recipe is one sentence, and exit code 2."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspec.train.voice import corpus

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import build_voice


@pytest.fixture
def build(tmp_path, monkeypatch, capsys):
    """Runs a stage in a folder of its own: the exit code and what it said."""

    def run(stage, *arguments):
        monkeypatch.setattr(sys, "argv", ["build_voice.py", stage, "--work", str(tmp_path), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            build_voice.main()
        return stopped.value.code, capsys.readouterr().err

    return run


def recording():
    return corpus.Recording("hello.", "slt", [("pau", 0.2)], np.arange(2000, dtype=np.int16))


def test_a_corpus_without_flite_is_refused_before_any_work(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = build("corpus")
    assert code == 2
    assert "expected flite to be installed" in said
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(("stage", "message"), [("encode", "record the corpus first"), ("target", "encode the corpus first")])
def test_a_stage_without_the_one_before_is_refused(build, stage, message):
    code, said = build(stage)
    assert code == 2
    assert message in said


def test_half_a_shard_is_named(build, tmp_path):
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "00000.npz"
    corpus.write_shard(path, [recording()])
    assert corpus.read_shard(path)[0].text == "hello."
    path.write_bytes(path.read_bytes()[:-400])
    code, said = build("encode")
    assert code == 2
    assert "expected a shard of recordings" in said
    assert "00000.npz" in said
    assert list((tmp_path / "codes").glob("*")) == []


def test_another_recipe_is_refused_and_other_steps_are_not(build, tmp_path):
    config = Path(build_voice.__file__).parent.parent / "configs" / "voice.toml"
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("width = 384", "width = 320"))
    more = tmp_path / "more.toml"
    more.write_text(config.read_text().replace("steps = 2600", "steps = 2700"))
    assert "encode the corpus first" in build("target")[1]
    assert "expected the width 384 that" in build("target", "--config", other)[1]
    assert "encode the corpus first" in build("target", "--config", more)[1]
