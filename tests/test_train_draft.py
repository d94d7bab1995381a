"""The training loop's promises, and `jaxspec train-draft` end to end: on a converted model and on the built-in voice."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_programs
from commands import own_cache, run
from folders import folder

from jaxspec.checkpoint import pretrained
from jaxspec.draft import block
from jaxspec.models import transformer
from jaxspec.train import drafts, features, log, loop, losses, packing, speech, trainer
from jaxspec.train import recipe as recipes
from jaxspec.train import samples as samples_lib
from jaxspec.train.drafts import Frozen, Task
from jaxspec.train.loop import TrainConfig, fit

__all__ = ["folder", "own_cache"]
pytestmark = pytest.mark.usefixtures("own_cache")
PROGRAMS = Path(train_programs.__file__)
TINY = 'family = "model"\nloss = "lk"\nrows = 2\nsteps = 4\n[draft]\nlayers = 2\n'


def start(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def rows(path):
    """The rows of a log without its times."""
    return [{name: value for name, value in row.items() if name != "step_s"} for row in log.read(path)]


# --- The loop ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_resumes_to_the_same_log_and_weights(tmp_path):
    whole = train_programs.train(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, train_programs.STEPS + 1))
    killed, deadline = start(PROGRAMS, "train", tmp_path / "parts"), time.monotonic() + 120
    while len(log.read(tmp_path / "parts")) < 8 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 8 <= len(rows(tmp_path / "parts")) < train_programs.STEPS
    with (tmp_path / "parts" / log.LOG).open("a") as file:
        file.write('{"step": 99, "lo')  # as a crash of the machine may leave it
    parts = train_programs.train(tmp_path / "parts")
    np.testing.assert_array_equal(whole["w"], parts["w"])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_checkpoint(tmp_path):
    def loss(params, batch, key):
        value, metrics = train_programs.loss(params, batch, key)
        return jnp.where(jnp.abs(params["w"][0]) > 0.12, jnp.nan, value), metrics

    steps = []
    for _ in range(2):  # the second run resumes and stops at the same step
        with pytest.raises(FloatingPointError, match=r"expected a finite loss, got nan in step \d+: lower") as caught:
            train_programs.train(tmp_path, loss=loss)
        steps.append(int(str(caught.value).split("step ")[1].split(":")[0]))
    (kept,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps[0] == steps[1] > kept >= steps[0] - 3
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path))


def test_a_folder_takes_one_trainer(tmp_path):
    with log.locked(tmp_path), pytest.raises(ValueError, match="expected a folder in which nobody else trains"):
        train_programs.train(tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    out, err = start(PROGRAMS, "full_disk", tmp_path).communicate()
    assert "expected room for the checkpoint of step 6" in out, err
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "checkpoints" / "6").exists()


def test_a_checkpoint_that_does_not_fit_the_disk_is_not_begun(tmp_path, monkeypatch):
    usage = loop.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda path: usage._replace(free=20))
    with pytest.raises(OSError, match="expected room for the checkpoint of step 3"):
        train_programs.train(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_two_devices_and_parts_of_a_batch_give_the_same_losses(tmp_path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    program = start(PROGRAMS, "devices", tmp_path, env=os.environ | {"XLA_FLAGS": flags})
    _, err = program.communicate()
    assert program.returncode == 0, err[-2000:]
    one, two, parts = ([row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two", "parts"))
    np.testing.assert_allclose(two, one, atol=2e-5)
    np.testing.assert_allclose(parts[0], one[0], rtol=0.05)  # the noise is drawn anew for each part


def test_rows_that_the_devices_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected rows that 1 devices times 3 parts divide, got 8"):
        train_programs.train(tmp_path, config={"accumulate": 3})


# --- The loss ---------------------------------------------------------------------------------------------------------------

SHAPE = transformer.Config((11, 5), 11, 16, 4, 2, 1, 8, 24)


def task(**changes):
    recipe = recipes.Recipe("model", {"layers": [0, -1]}, "tv")
    config = recipes.config(recipe, SHAPE)
    settings = {"sampling": losses.deployed(speech.Sampling(0.8, top_k=6)), "loss": "tv", "block": 1, "gamma": 0.0, "anchors": 0}
    return Task("model", config, **{**settings, "memory": 1 << 20, **changes})


@pytest.fixture(scope="module")
def target_and_batch():
    params = transformer.init_params(jax.random.key(0), SHAPE)
    rng = np.random.default_rng(0)
    made = [np.concatenate([rng.integers(11, 16, 3), rng.integers(11, size=n)]) for n in rng.integers(4, 12, 8)]
    samples = samples_lib.of_rows(made, [3] * 8, ["x"] * 8)
    return Frozen(params, None), samples, next(packing.batches(samples, 3, 32, 0))


def test_the_loss_is_the_mean_over_the_samples_one_by_one(target_and_batch):
    frozen, samples, _ = target_and_batch
    batch = packing.held_out(samples, 4, 32)[0]
    assert (batch.segment == 2).any(), "some rows hold several samples"
    own = drafts.own_params(jax.random.key(1), task(), frozen.target)
    values = []
    for i in range(len(samples.texts)):
        tokens = jnp.asarray(samples.row(i), jnp.int32)[None]
        scores = [
            transformer.Transformer(shape).apply({"params": params}, tokens)[0][0]
            for shape, params in (
                (transformer.dataclasses.replace(SHAPE, layers=2), drafts.full_params(task(), own, frozen.target)),
                (SHAPE, frozen.target),
            )
        ]
        log_p, q = losses.warp(*scores, task().sampling)
        at = np.arange(2, len(samples.row(i)) - 1)  # from the prompt's last token on
        values.append(np.abs(np.exp(log_p) - q)[at].sum(-1) / 2)
    for memory in (1 << 20, 1000):  # all anchors at once, or few
        value, metrics = jax.jit(drafts.loss, static_argnums=0)(task(memory=memory), frozen, own, batch, jax.random.key(2))
        np.testing.assert_allclose(value, np.concatenate(values).mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics["acceptance"], 1 - value, rtol=1e-4)


def test_parts_of_the_anchors_give_the_same_gradient(target_and_batch):
    frozen, _, batch = target_and_batch
    own = drafts.own_params(jax.random.key(1), task(), frozen.target)
    wide = {"block": 3, "gamma": 4.0, "anchors": 10, "loss": "lk"}
    whole, parts = (
        jax.jit(jax.grad(drafts.loss, argnums=2, has_aux=True), static_argnums=0)(
            task(**wide, memory=memory), frozen, own, batch, jax.random.key(2)
        )[0]
        for memory in (1 << 20, 1000)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole))


def test_anchors_precede_emitted_tokens(target_and_batch):
    _, _, batch = target_and_batch
    for count in (0, 6, 31):
        anchor, chosen = drafts.choose(jax.device_put(batch), count, jax.random.key(0))
        row, column = np.nonzero(np.asarray(chosen))
        at = np.asarray(anchor)[row, column]
        assert batch.emitted[row, at + 1].all()
        assert (batch.segment[row, at] == batch.segment[row, at + 1]).all()
        for one, mask in zip(np.asarray(anchor), np.asarray(chosen), strict=True):
            assert len(set(one[mask])) == mask.sum()
    everywhere = (batch.emitted[:, 1:] & (batch.segment[:, 1:] == batch.segment[:, :-1])).sum(1)
    assert (np.asarray(drafts.choose(batch, 0, jax.random.key(0))[1]).sum(1) == everywhere).all()


def test_the_features_of_a_cache_are_those_of_the_pass(target_and_batch, tmp_path):
    (target, _), samples, _ = target_and_batch
    reader = block.Config(SHAPE, (0, 4), 2, 1, 8, 2, 1, 8, 24, own_head=True)
    some = dataclasses.replace(task(), family="block", config=reader)
    kept = features.cached(tmp_path, some, target, samples, 2, 16)
    assert kept.features.shape == (len(samples.tokens), 3 * SHAPE.width)
    assert features.cached(tmp_path, some, {}, samples, 2, 16).features.tolist() == kept.features.tolist()  # read from the file
    for known, fresh in zip(*(packing.held_out(one, 2, 32) for one in (kept, samples)), strict=True):
        found, wanted = (drafts.score(some, target, jax.device_put(batch)) for batch in (known, fresh))
        real = np.asarray(fresh.segment > 0)[:, :, None]
        for ours, theirs in ((found.features, wanted.features), (found.hidden, wanted.hidden)):
            np.testing.assert_allclose(ours * real, theirs * real, rtol=2e-3, atol=2e-3)


def test_a_cache_that_does_not_fit_the_disk_is_not_begun(target_and_batch, tmp_path, monkeypatch):
    (target, _), samples, _ = target_and_batch
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage._replace(free=20))
    with pytest.raises(OSError, match="got less: leave --cache-features out"):
        features.cached(tmp_path, task(), target, samples, 2, 16)
    assert list(tmp_path.iterdir()) == []


# --- The command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"We can stop the rain {i}." for i in range(48)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def trained(folder, texts, tiny, tmp_path_factory):
    """A draft that was trained from texts for a converted model, and what the command printed."""
    out = tmp_path_factory.mktemp("trained") / "draft"
    arguments = ["--texts", texts, "--recipe", tiny, "--max-codes", "150", "--batch", "16", "--temperature", "1", "--json"]
    return out, arguments, run("train-draft", folder("target"), "--out", out, *arguments)


def test_a_draft_is_trained_from_texts_and_spoken_with(folder, trained, tmp_path):
    out, arguments, (code, printed, err) = trained
    assert code == 0, err
    figures, work = json.loads(printed), trainer.work_folder(out)
    assert [row["step"] for row in rows(work)] == [1, 2, 3, 4]
    assert {path.name for path in work.iterdir()} >= {"training.json", "training.png", "costs.json", "checkpoints", "samples"}
    for rule in ("exact", "groups"):
        assert len(figures[f"acceptance_{rule}"]) == len(figures[f"tokens_{rule}"]) == len(figures[f"speed_up_{rule}"]) == 8
        assert 0 < figures[f"acceptance_{rule}"][0] <= 1
    assert "min left" in err
    target = pretrained.load(folder("target"))
    draft = pretrained.load_draft(out, target)
    assert draft.feature_layers == ()
    assert figures["digest"] == json.loads((out / "jaxspec.json").read_text())["digest"]
    code, printed, err = run(
        "say", "Stop.", "--model", folder("target"), "--draft", out, "--out", tmp_path / "a.npy", "--verify", "exact",
        "--max-codes", "20", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert np.load(tmp_path / "a.npy").size > 0
    code, _, err = run("train-draft", folder("target"), "--out", out, *arguments)
    assert code == 2
    assert "which exists" in err


def test_a_training_that_is_killed_resumes_to_the_last_digit(folder, trained, tiny, tmp_path):
    out, _, _ = trained
    work, again = trainer.work_folder(out), tmp_path / "again"
    trainer.work_folder(again).mkdir()
    shutil.copy(work / "costs.json", trainer.work_folder(again))
    argv = ["train-draft", folder("target"), "--data", work / "samples", "--recipe", tiny, "--out", again, "--temperature", "1"]
    killed, deadline = start("-m", "jaxspec.commands.main", *argv), time.monotonic() + 200
    while len(log.read(trainer.work_folder(again))) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not again.exists()
    code, _, err = run(*argv)
    assert code == 0, err
    assert rows(trainer.work_folder(again)) == rows(work)
    digests = [json.loads((path / "jaxspec.json").read_text())["digest"] for path in (out, again)]
    assert digests[0] == digests[1]


def test_hidden_states_that_were_computed_before_train_the_same_draft(folder, trained, tiny, tmp_path):
    out, _, _ = trained
    work, again = trainer.work_folder(out), tmp_path / "again"
    trainer.work_folder(again).mkdir()
    shutil.copy(work / "costs.json", trainer.work_folder(again))
    argv = ["--data", work / "samples", "--recipe", tiny, "--out", again, "--temperature", "1", "--cache-features"]
    code, _, err = run("train-draft", folder("target"), *argv)
    assert code == 0, err
    assert "hidden states of" in err
    for cached, row in zip(rows(trainer.work_folder(again)), rows(work), strict=True):
        assert cached["loss"] == pytest.approx(row["loss"], abs=2e-3)
        assert cached["acceptance_exact"] == pytest.approx(row["acceptance_exact"], abs=2e-3)


def test_a_work_folder_belongs_to_one_training(folder, trained, tiny, tmp_path):
    out, _, _ = trained
    again = tmp_path / "again"
    shutil.copytree(trainer.work_folder(out), trainer.work_folder(again), ignore=shutil.ignore_patterns("checkpoints"))
    argv = ["--data", trainer.work_folder(out) / "samples", "--recipe", tiny, "--out", again, "--temperature", "1"]
    code, _, err = run("train-draft", folder("target"), *argv, "--steps", "5")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected the steps 4" in err
    assert not again.exists()


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=pytest.mark.slow) for name in ("group", "distil", "pcg", "voice")])
def test_a_draft_is_trained_for_the_builtin_voice(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(trainer, "_LONGEST", 2)  # compiles less
    target, rng = speech.load_target("builtin"), np.random.default_rng(0)
    codes = [rng.integers(4000, size=30) for _ in range(16)]
    samples_lib.write_shard(tmp_path / "00000.npz", samples_lib.of_rows(codes, None, ["hello."] * 16))
    short = recipes.read(recipe, steps=2, rows=1, length=128)
    samples = speech.read(tmp_path, target)
    made = trainer.train(tmp_path / "draft", short, target, samples, target.sampling, lambda line: None)
    assert np.isfinite(made.last["loss"])
    assert made.description.target == target.pretrained.model.digest
    loaded = pretrained.load_draft(tmp_path / "draft", target.pretrained)
    assert loaded.drafter(2).length == 2
    assert made.last["speed_up_exact"][1] > 0


def test_the_recipes_of_the_package():
    assert {"distil", "group", "pcg", "ssd"} <= set(recipes.names())
    deep = transformer.Config((11, 5), 11, 16, 16, 2, 1, 8, 24)
    for name in recipes.names():
        made = recipes.config(recipes.read(name), deep)
        assert made.target == deep
        assert recipes.read(name).block <= (recipes.FAMILIES[recipes.read(name).family].max_length(made) or 8)
    block = recipes.config(recipes.read("block"), deep)
    assert (block.width, block.reads) == (16, (1, 4, 7, 10, 13))
    ssd = recipes.config(recipes.read("ssd"), deep)
    assert ssd.layers == (0, 1, 10, 11, 12, 13, 14, 15)
    frozen = recipes.FAMILIES["model"].shared(ssd)
    assert {path.split("/")[0] for path in frozen} == {"table_0", "table_1", "norm", *(f"layer_{i}" for i in range(2, 8))}
    assert recipes.config(recipes.read("pcg"), deep).layers == (0, 8, 15)


BAD = {
    "no steps": (["--steps", "0"], "expected steps of 1 or more"),
    "unknown recipe": (["--recipe", "nothing"], "expected a recipe among"),
    "no data": ([], "expected either --texts or --data"),
    "a missing file": (["--texts", "nowhere.txt"], "expected a text file"),
    "an empty folder": (["--data", "."], "expected a folder with .npz shards"),
    "a shallow target": (["--recipe", "ssd", "--data", "good"], "expected a target of more than 6 layers"),
    "codes beyond V": (["--data", "beyond"], "expected emitted tokens from 0 to 4375"),
    "few samples": (["--data", "few"], "expected at least 16 samples, got 3"),
    "the draft exists": (["--data", "good", "--out", "there"], "which exists"),
    "a folder that does not": (["--data", "good", "--out", "a/b/c"], "make a/b first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_no_draft(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for name, top, count in (("good", 4000, 20), ("beyond", 4400, 20), ("few", 4000, 3)):
        Path(name).mkdir()
        data = samples_lib.of_rows([np.array([4377, 5, top - 1])] * count, [1] * count, ["a"] * count)
        samples_lib.write_shard(Path(name, "00000.npz"), data)
    Path("there").mkdir()
    arguments, message = BAD[case]
    code, printed, err = run("train-draft", "builtin", *(() if "--out" in arguments else ("--out", "draft")), *arguments)
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not Path("draft").exists()


def test_a_target_without_a_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder("target"), tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").unlink()
    code, _, err = run("train-draft", tmp_path / "target", "--out", tmp_path / "draft", "--texts", PROGRAMS)
    assert (code, err.count("\n")) == (2, 1)
    assert "expected a tokenizer" in err


RECIPES = {
    'family = "model"\nloss = "tv"\n': "draft",
    TINY.replace('"lk"', '"l2"'): "expected a loss among",
    TINY.replace('"model"', '"modem"'): "expected a family among",
    TINY.replace("rows = 2", "rows = 3\naccumulate = 2"): "accumulate=2 divides",
    TINY.replace("layers = 2", "layer = 2"): "layer",
    TINY.replace("layers = 2", "layers = [0, 9]"): "expected layers from -4 to 3",
    TINY.replace("layers = 2", "shape = {depth = 2}"): "expected a shape of",
    TINY.replace("steps = 4", "steps = "): "expected a recipe in",
    TINY.replace("steps = 4", "stepz = 4"): "stepz",
}


@pytest.mark.parametrize("content", RECIPES)
def test_a_wrong_recipe_is_refused(tmp_path, content):
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=RECIPES[content]):
        recipes.config(recipes.read(str(path)), SHAPE)


@pytest.mark.slow
def test_a_draft_for_llasa_1b_trains_within_24_gb(tmp_path):
    """Random weights of the true shape, two steps of one row of 512 tokens; the memory of a process of its own."""
    program = start(PROGRAMS, "llasa_1b", tmp_path)
    out, err = program.communicate()
    assert program.returncode == 0, err[-2000:]
    assert float(out.split()[-1]) < 24, out


def test_the_loop_evaluates_and_logs_lists(tmp_path):
    config = TrainConfig(4, 1e-2, warmup_steps=1, checkpoint_every=2, log_every=3, evaluate_every=2)
    found = {"list": np.array([0.123456, 1.0]), "number": 2.0}
    lines = []
    fit(tmp_path, {"w": jnp.zeros(3)}, train_programs.loss, train_programs.batches, config, lines.append, lambda _: found, print)
    assert [(row["step"], row.get("list")) for row in rows(tmp_path)] == [(2, [0.12346, 1.0]), (3, None), (4, [0.12346, 1.0])]
    assert "number 2.000" in lines[0]
    assert "list" not in lines[0]
