"""The files of `say`: each is written when it is done, lines that fail are named, a run is resumed, and suffixes are formats."""

import io
import json

import commands
import numpy as np
import pytest
import soundfile

from jaxspec.commands import outputs
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import Utterance, speak

own_cache = commands.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")


def test_lines_that_cannot_be_spoken_are_named_at_the_end_and_the_others_are_written(tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("Yes, we can.\n\n?!\nOne day we met.\n")
    arguments = ["say", "--file", texts, "--out-dir", out, "--format", "npy", "--verify", "autoregressive", "--json"]
    code, printed, err = commands.run(*arguments)
    assert code == 2
    assert "got 1 of 3 lines that cannot" in err
    assert "\n  line 3: " in err
    assert "?!" in err
    assert set(json.loads(printed)["failed"]) == {"3"}
    assert sorted(path.name for path in out.iterdir()) == ["001.npy", "003.npy", "manifest.jsonl"]
    assert [json.loads(line)["line"] for line in (out / "manifest.jsonl").read_text().splitlines()] == [1, 4]


def test_resume_writes_what_is_missing_or_was_asked_for_otherwise(tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("Yes, we can.\nOne day we met.\n")
    arguments = ["say", "--file", texts, "--out-dir", out, "--format", "npy", "--verify", "autoregressive", "--resume"]

    def written(*more):
        """The files that a run wrote, by the lines that it added to the manifest."""
        before = (out / "manifest.jsonl").read_text() if out.exists() else ""
        code, _, err = commands.run(*arguments, *more)
        assert code == 0, err
        added = (out / "manifest.jsonl").read_text().removeprefix(before)
        return [json.loads(line)["file"] for line in added.splitlines()]

    assert written() == ["001.npy", "002.npy"]
    codes = np.load(out / "002.npy")
    assert written() == []
    (out / "002.npy").unlink()
    assert written() == ["002.npy"]
    np.testing.assert_array_equal(np.load(out / "002.npy"), codes)  # the seed of a piece is its own
    assert written("--seed", "1") == ["001.npy", "002.npy"]
    texts.write_text("Yes, we can.\nOne day we left.\n")
    assert written("--seed", "1") == ["002.npy"]


def test_an_interrupt_is_one_line_and_leaves_the_files_that_are_done(tmp_path, monkeypatch):
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("Yes, we can.\nOne day we met.\n")
    real = outputs.write

    def write_one(path, utterance):
        if path.name == "002.npy":
            raise KeyboardInterrupt
        real(path, utterance)

    monkeypatch.setattr(outputs, "write", write_one)
    code, _, err = commands.run("say", "--file", texts, "--out-dir", out, "--format", "npy", "--verify", "autoregressive")
    assert (code, err) == (130, "jaxspec: interrupted; 1 of 2 files are written, --resume continues with the others\n")
    assert sorted(path.name for path in out.iterdir()) == ["001.npy", "manifest.jsonl"]


@pytest.mark.parametrize("words", [["-"], []])
def test_standard_input_is_a_text(tmp_path, monkeypatch, words):
    monkeypatch.setattr("sys.stdin", io.StringIO("Yes, we can.\n"))
    code, _, err = commands.run("say", *words, "--out", tmp_path / "a.npy", "--verify", "autoregressive")
    assert code == 0, err
    expected = speak("Yes, we can.", Settings(verify="autoregressive")).utterances[0].codes
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_the_suffix_is_the_format(tmp_path, kind):
    wave = np.sin(np.arange(16_000) / 20).astype(np.float32) / 2
    outputs.write(tmp_path / f"a.{kind}", Utterance(wave, np.zeros(25, np.int32), np.zeros(25, np.int8), 16_000))
    assert soundfile.info(tmp_path / f"a.{kind}").format == kind.upper()
    read, rate = soundfile.read(tmp_path / f"a.{kind}")
    assert rate == 16_000
    np.testing.assert_allclose(np.sqrt(np.mean(read[:16_000] ** 2)), np.sqrt(np.mean(wave**2)), rtol=0.05)


def test_json_is_all_of_standard_output(tmp_path):
    _, printed, err = commands.run("say", "Yes.", "--out", tmp_path / "a.npy", "--verify", "autoregressive", "--json")
    assert json.loads(printed)["verify"] == "autoregressive"
    assert "one per step" in err
