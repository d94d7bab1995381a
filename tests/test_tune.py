"""Tuning a draft: what is tried and chosen, what is written into its folder, and what uses it from there."""

import dataclasses
import json

import commands
import folders
import numpy as np
import pytest

from jaxspec.bench import tuning
from jaxspec.bench.cases import Case
from jaxspec.bench.tuning import PLAIN, Candidates
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.checkpoint.descriptions import DraftDescription, Tuned
from jaxspec.draft import families, smaller
from jaxspec.synthesis import load
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.decoding import resolve

pytestmark = pytest.mark.usefixtures("own_cache")
own_cache, run, folder = commands.own_cache, commands.run, folders.folder

TUNED = Tuned("block-coarse-grained", 2, 0.6, 0.1, 0.05, 1.8, 1.2, 1, "cpu", "0.1.0")


@pytest.fixture
def draft(folder, tmp_path):
    """A draft that was trained for the target: all of its layers, so that every code is accepted."""
    target = pretrained.load(folder("target"), "float32")
    settings = families.to_json(smaller.Config(target.model.shape, layers=(0, 1, 2)))
    description = DraftDescription("model", settings, target.model.digest)
    pretrained.save(tmp_path / "draft", description, target.params)
    return tmp_path / "draft"


def row(rule, length, speed_up, loss, threshold=None):
    return {"rule": rule, "draft_length": length, "speed_up": speed_up, "quality_loss": loss, "threshold": threshold} | {
        "tokens_per_round": 1.5
    }


def test_the_fastest_within_the_loss_is_chosen():
    plain = row(PLAIN, 0, 1.0, 0.0)
    rows = [plain, row("exact", 3, 1.2, 0.0), row("coarse-grained", 5, 1.6, 0.2, 0.7), row("coarse-grained", 3, 1.4, 0.1, 0.8)]
    for most, expected in ((0.0, ("exact", 3, None)), (0.1, ("coarse-grained", 3, 0.8)), (0.3, ("coarse-grained", 5, 0.7))):
        chosen = tuning.tuned(rows, Candidates(most))
        assert (chosen.verify, chosen.draft_length, chosen.threshold, chosen.max_quality_loss) == (*expected, most)
    slow = tuning.tuned([plain, row("exact", 3, 0.8, 0.0), row("exact", 5, 0.7, 0.0)], Candidates())
    assert (slow.verify, slow.draft_length, slow.speed_up) == (PLAIN, 3, 1.0)


def test_only_what_may_be_chosen_is_tried():
    exact = Candidates(draft_lengths=(3, 2, 7)).cases("d", 0.85, longest=5)
    assert exact == [Case(PLAIN, 0, 1, 0), *(Case(rule, k, 1, 0, "d") for rule in ("exact", "block-exact") for k in (2, 3))]
    some = Candidates(0.1, draft_lengths=(2,), batch=4).cases("d", 0.96, longest=None)
    assert [(case.rule, case.threshold) for case in some[1:]] == [
        ("exact", None),
        ("block-exact", None),
        *((rule, threshold) for rule in ("coarse-grained", "block-coarse-grained") for threshold in (0.91, 0.96)),
    ]
    assert {case.batch for case in some} == {4}


def test_a_draft_is_measured_and_its_folder_says_how_to_use_it(folder, draft, tmp_path):
    (tmp_path / "texts").write_text("Yes.\n\nThe rain has stopped, so we can go.\n")
    before = descriptions.read(draft)
    common = ["tune", folder("target"), "--draft", draft, "--texts", tmp_path / "texts", "--max-codes", "12"]
    limits = ["--draft-lengths", "2", "--verify", "exact", "coarse-grained", "--thresholds", "0.3", "--max-quality-loss", "0.5"]
    code, printed, err = run(*common, *limits, "--json")
    assert code == 0, err
    result = json.loads(printed)
    plain, exact, grouped = result["rows"]
    assert [one["rule"] for one in result["rows"]] == [PLAIN, "exact", "coarse-grained"]
    assert grouped["threshold"] == 0.3
    for one in result["rows"]:
        assert one["compilations_after_warm_up"] == 0
        assert one["speed_up"] == pytest.approx(one["tokens_per_round"] * plain["round_s"] / one["round_s"])
        assert one["quality_loss"] == 0  # the draft is the target
    assert exact["acceptance_rate"] > 0.99
    assert result["written"]
    assert "chosen on" in err
    after = descriptions.read(draft)
    assert after == dataclasses.replace(before, tuned=result["tuned"])
    assert descriptions.tuned_of(after, draft).max_quality_loss == 0.5
    assert after.tuned["verify"] in (PLAIN, "exact", "coarse-grained")


def test_what_was_tuned_is_the_default(folder, draft):
    descriptions.write_tuned(draft, TUNED)
    synthesizer = load.load(folder("target"), draft)
    assert synthesizer.drafter.tuned == TUNED
    decoding = resolve(synthesizer, Settings())
    assert (decoding.name, decoding.draft.length) == ("block-coarse-grained", 2)
    groups, expected = decoding.verify.args[0], synthesizer.groups(0.6, "target")
    np.testing.assert_array_equal(groups.members, expected.members)
    assert len(expected.members) != len(synthesizer.groups(synthesizer.threshold, "target").members)
    asked = resolve(synthesizer, Settings(verify="exact", draft_length=4))
    assert (asked.name, asked.draft.length) == ("exact", 4)
    assert resolve(synthesizer, Settings(draft_length=0)).name == PLAIN
    descriptions.write_tuned(draft, dataclasses.replace(TUNED, verify=PLAIN, threshold=None))
    slow = load.load(folder("target"), draft)
    assert resolve(slow, Settings()).draft is None
    assert resolve(slow, Settings(verify="exact")).draft.length == 2


def test_a_draft_that_was_not_tuned_drafts_as_many_codes_as_it_can(folder, draft):
    synthesizer = load.load(folder("target"), draft)
    assert synthesizer.drafter.tuned is None
    usual = resolve(synthesizer, Settings())
    assert (usual.name, usual.draft.length) == ("coarse-grained", 3)
    short = synthesizer._replace(drafter=synthesizer.drafter._replace(max_length=2))
    assert resolve(short, Settings()).draft.length == 2
    with pytest.raises(ValueError, match="expected a draft length of at most 2, got 3"):
        resolve(short, Settings(draft_length=3))


def test_a_damaged_description_is_refused(folder, draft):
    values = descriptions.to_json(descriptions.read(draft))
    for wrong in ({"verify": "exact"}, {**dataclasses.asdict(TUNED), "verify": "guess"}):
        (draft / "jaxspec.json").write_text(json.dumps({"format": 1, **values, "tuned": wrong}))
        with pytest.raises(ValueError, match=r"expected what `jaxspec tune` writes as tuned in .* run it again"):
            load.load(folder("target"), draft)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-quality-loss", "1.5"], "expected a largest quality loss from 0 to 1, got 1.5"),
        (["--draft-lengths", "0"], "draft lengths and a batch of 1 or more"),
        (["--thresholds", "2"], "expected thresholds in (-1, 1]"),
        (["--draft", "nowhere"], "got no such folder"),
        (["--texts", "nowhere"], "expected a text file in UTF-8, got nowhere"),
        (["--verify", "coarse-grained"], "a rule within a loss of 0.0"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message, folder, tmp_path):
    (tmp_path / "texts").write_text("Yes.\n")
    given = {"--draft": "ngram", "--texts": str(tmp_path / "texts")} | dict([arguments])
    code, printed, err = run("tune", folder("target"), *[part for pair in given.items() for part in pair])
    assert code == 2
    assert not printed
    assert err.startswith("jaxspec: expected ")
    assert message in err
    assert len(err.splitlines()) == 1
