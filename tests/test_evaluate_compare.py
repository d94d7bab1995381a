"""The comparison: what it needs is checked first, rows hold what was synthesised, and the command reports progress."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.commands import evaluate as command
from jaxspec.commands.evaluate import Evaluate
from jaxspec.common import records
from jaxspec.draft import ngram_draft
from jaxspec.evaluate import compare, measures, naturalness, requirements
from jaxspec.evaluate.plan import Plan
from jaxspec.evaluate.recognize import PACKAGES, ErrorRates
from jaxspec.models import builtin as voices
from jaxspec.models.builtin import VOCAB, VOICES
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.decoding import Decoding
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import SynthesisResult, Utterance
from jaxspec.text.held_out import held_out
from jaxspec.train.voice.corpus import Recording

SMALL = {"sentences": 4, "seeds": 2, "betas": (0.2,), "thresholds": (0.85,)}
COUNTS = {"tokens": 40, "rounds": 20, "drafted": 60, "accepted": 15, "exact_match_rate": 0.6}


@pytest.fixture
def installed(monkeypatch):
    """Everything is said to be installed."""
    monkeypatch.setattr(requirements.shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in (*requirements.MODULES, *PACKAGES.values()):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setattr(naturalness, "has_distill_mos", lambda: False)


@pytest.fixture
def work(monkeypatch):
    """Counts what is loaded, recorded and synthesised."""
    calls = []
    for module, name in ((compare, "load"), (measures, "record"), (compare, "speak")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: calls.append(name))
    return calls


def level(sentence, voice):
    """What every sample of a wave is: a thousandth of the sentence's number, and 1 more for the second voice."""
    return (1 + held_out().index(sentence)) / 1000 + VOICES.index(voice)


@pytest.fixture
def fakes(monkeypatch, installed):
    """Constant waves of ``level`` in place of synthesis, and fakes of the recorder, the recogniser and the speaker encoder."""

    def record(text, voice):
        (sentence,) = (s for s in held_out() if measures.symbols.normalize(s) == text)
        return Recording(text, voice, [], np.full(16_000, 30_000 * level(sentence, voice) / 1.1, np.int16))

    def speak(texts, settings, synthesizer, decoding):
        voice = settings.voice or VOICES[0]
        waves = [np.full(16_000, level(t, voice) if t in held_out() else 1, np.float32) for t in texts]
        utterances = [Utterance(wave, np.arange(3, dtype=np.int32), np.zeros(3, np.int8), 16_000) for wave in waves]
        drafted = 0 if settings.verify == "autoregressive" else COUNTS["drafted"]
        return SynthesisResult(utterances, COUNTS | {"drafted": drafted}, {"lm": 0.5 if drafted else 1.0})

    spoken = []

    def transcribe(waves, recognizer):
        spoken.append([round(float(wave[0]), 3) for wave in waves])
        return ["word"] * len(waves)

    def embed(waves, rate):
        return np.stack([np.eye(2, dtype=np.float32)[int(wave[0] > 0.5)] + np.float32(0.1) for wave in waves])

    monkeypatch.setattr(measures, "record", record)
    monkeypatch.setattr(measures, "transcribe", transcribe)
    monkeypatch.setattr(measures, "embed", embed)
    monkeypatch.setattr(measures, "naturalness", lambda waves: {"dnsmos": len(waves), "distill_mos": float(waves[1][0])})
    monkeypatch.setattr(measures, "error_rates", lambda *_: ErrorRates(0.1, 0.05, (0.08, 0.12), (0.04, 0.06)))
    monkeypatch.setattr(compare, "speak", speak)
    monkeypatch.setattr(compare, "_steps", lambda *_: [(np.eye(VOCAB, dtype=np.float32)[0],) * 2])
    return spoken


@pytest.mark.parametrize("missing", [["flite"], ["resemblyzer"], ["flite", "jiwer", "resemblyzer"]])
def test_what_is_missing_is_named_at_once_and_nothing_is_done(tmp_path, monkeypatch, installed, work, missing):
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None if name in missing else f"/usr/bin/{name}")
    for name in set(missing) & set(requirements.MODULES):
        monkeypatch.setitem(sys.modules, name, None)
    for start in (Evaluate(out_dir=tmp_path / "out", **SMALL).run, lambda: compare.compare(Plan(**SMALL))):
        with pytest.raises(RuntimeError, match=f"got no {', no '.join(missing)}: ") as refusal:
            start()
        assert ("apt-get install flite" in str(refusal.value)) == ("flite" in missing)
        assert ("pip install 'jaxspec[eval]'" in str(refusal.value)) == (missing != ["flite"])
    assert work == []
    assert not (tmp_path / "out").exists()


def test_the_packages_of_the_extra_are_found(monkeypatch):
    monkeypatch.setattr(requirements.shutil, "which", lambda name: name)
    for recognizer in PACKAGES:
        requirements.check(recognizer)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, installed, work):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder that can be created, got .*file"):
        Evaluate(out_dir=tmp_path / "file" / "out", **SMALL).run()
    assert work == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": 1}, "expected 2 to 200 sentences, got 1"),
        ({"sentences": 201}, "got 201"),
        ({"texts": "prose", "sentences": 41}, "expected 2 to 40 sentences, got 41"),
        ({"seeds": 0}, "1 seed or more, got 0"),
        ({"draft_length": 0}, "draft length of 1 or more, got 0"),
        ({"thresholds": (1.5,)}, "threshold"),
        ({"betas": (-0.1,)}, "beta"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_an_impossible_plan_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**change)


def test_rows_hold_every_sentence_in_its_voice_and_the_rates_of_all_seeds(fakes):
    steps = []
    result = compare.compare(Plan(**SMALL), lambda *step: steps.append(step))
    rows = {row["row"]: row for row in result["rows"]}
    assert list(rows) == [
        "recordings",
        "codec reconstruction",
        "autoregressive",
        "swapped in group 0.85",
        "exact",
        "tolerance 0.2",
        "coarse-grained 0.85",
    ]
    expected = [round(level(sentence, measures.voice_of(i)), 3) for i, sentence in enumerate(held_out()[:4])]
    assert fakes.count(expected) == 2 * 4  # two seeds of each row that the models generate
    assert rows["exact"]["acceptance_rate"] == pytest.approx(15 / 60)
    assert rows["exact"]["tokens_per_round"] == pytest.approx(2)
    assert rows["exact"]["exact_match_rate"] == pytest.approx(0.6)
    assert rows["exact"]["speed_up"] == pytest.approx(2)
    assert rows["exact"]["similarity"] == pytest.approx(1)
    assert rows["exact"]["similarity_to_others"] == pytest.approx(2 * 0.11 / (1.21 + 0.01))
    assert rows["exact"]["duration_ratio"] == pytest.approx(1)
    assert (rows["exact"]["dnsmos"], rows["exact"]["distill_mos"]) == (4, pytest.approx(1.002))  # of the first seed
    assert (rows["exact"]["same"], rows["exact"]["distance"]) == (1, 0)
    assert not {"acceptance_rate", "same"} & rows["autoregressive"].keys()
    assert "speed_up" not in rows["recordings"]
    done, total = zip(*(step[1:] for step in steps), strict=True)
    assert set(total) == {done[-1]}
    assert list(done) == sorted(done)


def test_any_drafter_by_name(monkeypatch, fakes):
    drafts = set()

    def resolve(synthesizer, settings):
        drafts.add(synthesizer.drafter.make(settings.draft_length or 3))
        return Decoding("autoregressive")

    monkeypatch.setattr(compare, "resolve", resolve)
    plain = {"sentences": 2, "seeds": 1, "betas": (), "thresholds": ()}
    result = compare.compare(Plan(draft="ngram", draft_length=2, **plain))
    assert [row["row"] for row in result["rows"][2:]] == ["autoregressive", "exact"]
    assert drafts == {ngram_draft(2, vocab=VOCAB)}


def test_blocks_are_compared_where_they_are_asked_for():
    some = {"betas": (0.2,), "thresholds": (0.7, 0.85)}
    usual, more = Plan(**some).settings(), Plan(blocks=True, **some).settings()
    added = {name: (one.verify, one.threshold) for name, one in more.items() if name not in usual}
    assert added == {
        "block-exact": ("block-exact", None),
        "block-coarse-grained 0.7": ("block-coarse-grained", 0.7),
        "block-coarse-grained 0.85": ("block-coarse-grained", 0.85),
    }
    assert usual == {name: more[name] for name in usual}


def test_a_draft_that_was_trained_for_the_voice_is_loaded_from_its_folder(tmp_path):
    voice = builtin()
    loaded = voices.load()
    description = records.from_json(DraftDescription, loaded.draft)
    assert description.target == voices.digest(loaded)
    pretrained.save(tmp_path / "draft", description, voice.drafter.params)
    loaded = load(draft=tmp_path / "draft")
    assert loaded.drafter.params["target"]["table_1"] is voice.target_params["table_1"]
    jax.tree.map(np.testing.assert_array_equal, loaded.drafter.params, voice.drafter.params)
    assert loaded.drafter.make(2).length == 2
    pretrained.save(tmp_path / "other", dataclasses.replace(description, target="blake3:0"), voice.drafter.params)
    with pytest.raises(ValueError, match="expected the target blake3:0 for the draft"):
        load(draft=tmp_path / "other")


def test_a_folder_without_a_draft_is_refused_before_any_work(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(compare, "speak", None)
    monkeypatch.setattr(measures, "record", None)
    with pytest.raises(ValueError, match="expected"):
        compare.compare(Plan(draft=str(tmp_path)))


def test_waves_too_short_or_silent_have_neither_similarity_nor_naturalness(fakes):
    short = [np.ones(100, np.float32), np.zeros(16_000, np.float32)]
    assert measures._of_the_sound(short, {}) == {}
    found = measures._of_the_sound([*short, *[np.ones(16_000, np.float32)] * 2], dict.fromkeys(VOICES, np.ones(2)))
    assert found["dnsmos"] == 2


def test_standard_output_is_json_only_or_the_table(tmp_path, capsys, monkeypatch, fakes):
    Evaluate(out_dir=tmp_path / "out", json=True, **SMALL).run()
    printed = capsys.readouterr()
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert json.loads(printed.out) == result
    assert "│ coarse-grained 0.85" in printed.err
    monkeypatch.setattr(command, "compare_with_progress", lambda plan: result)
    Evaluate(out_dir=tmp_path / "out", **SMALL).run()
    assert "│ coarse-grained 0.85" in capsys.readouterr().out


def test_an_interrupt_is_not_caught(tmp_path, monkeypatch, fakes):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "transcribe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Evaluate(out_dir=tmp_path / "out", **SMALL).run()
    assert list((tmp_path / "out").iterdir()) == []
