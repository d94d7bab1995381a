"""The groups of converted checkpoints: made once, kept in the model's folder, reported and drawn by the command `groups`."""

import json

import checkpoints
import commands
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import groups as asg
from jaxspec.checkpoint import groups as group_files
from jaxspec.checkpoint import pretrained
from jaxspec.synthesis import converted

own_cache, folder = commands.own_cache, folders.folder
pytestmark = pytest.mark.usefixtures("own_cache")


def test_groups_are_made_once_and_kept(folder, tmp_path, monkeypatch):
    target = pretrained.load(folder("orpheus"))
    first, vocab = target.model.codes_first, target.model.shape.vocab
    target = target._replace(folder=tmp_path, params={"table_0": jnp.ones((vocab, 4))})
    made = converted.groups(target, 0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["groups-0.3.npz"]
    assert made.sizes.tolist() == [16] * 7 + [1] * (vocab - 7 * 16)  # a group for each slot, as all codes of it are alike
    np.testing.assert_array_equal(made.members[:7], first + np.arange(7 * 16).reshape(7, 16))
    with monkeypatch.context() as patched:
        patched.setattr(converted.asg, "acoustic_similarity_groups", None)
        jax.tree.map(np.testing.assert_array_equal, converted.groups(target, 0.3), made)
    other = pretrained.load(folder("llasa"))._replace(folder=tmp_path)
    assert len(converted.groups(other, 0.3).token_start) == other.model.shape.vocab != vocab
    assert len(group_files.load(tmp_path / "groups-0.3.npz").token_start) == other.model.shape.vocab


def test_groups_are_those_of_the_codes_embeddings(folder, tmp_path):
    target = pretrained.load(folder("llasa"))._replace(folder=tmp_path)
    first = target.model.codes_first
    table = np.asarray(target.params["table_0"])[first : first + checkpoints.CODES]
    made = converted.groups(target, 0.2)
    alone = asg.acoustic_similarity_groups(table, 0.2)
    assert len(made.sizes) == len(alone.sizes) + target.model.shape.vocab - checkpoints.CODES
    count = len(alone.sizes)
    np.testing.assert_array_equal(made.sizes[:count], alone.sizes)
    mine, theirs = np.asarray(made.members)[:count, : alone.members.shape[1]], np.asarray(alone.members)
    np.testing.assert_array_equal(mine, np.where(theirs < checkpoints.CODES, theirs + first, target.model.shape.vocab))


def test_a_folder_that_cannot_be_written_to_does_not_matter(folder, tmp_path):
    target = pretrained.load(folder("llasa"))._replace(folder=tmp_path / "none")
    assert len(converted.groups(target, 0.3).token_start) == target.model.shape.vocab


def test_the_command_groups_reports_and_draws(folder, tmp_path):
    arguments = ["groups", folder("target"), "--threshold", "0.25", "--plot", tmp_path / "a.png"]
    code, printed, _ = commands.run(*arguments, "--json")
    report = json.loads(printed)
    assert code == 0
    assert (report["tokens"], report["threshold"]) == (97, 0.25)
    assert report["file"] == str(folder("target") / "groups-0.25.npz")
    assert len(group_files.load(report["file"]).sizes) == report["groups"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = commands.run(*arguments)
    assert code == 0
    assert f"groups                  {report['groups']}\n" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["target", "--threshold", "2"], "threshold"),
        (["xcodec2"], "expected a language model in"),
        (["nowhere"], "expected a folder that `jaxspec convert` made at nowhere"),
        (["target", "--plot", "nowhere/a.png"], "nowhere/a.png"),
    ],
)
def test_the_command_groups_refuses_in_one_sentence(folder, arguments, message):
    words = [folder(word) if word in folders.FOLDERS else word for word in arguments]
    code, _, err = commands.run("groups", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
