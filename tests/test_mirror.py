"""The draft on a device of its own: branches change no token and no law, and what is refused."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import checkpoints
import chi_square
import commands
import fakes
import jax
import numpy as np
import pytest
import test_speculate

from jaxspec import mirror
from jaxspec.models import transformer
from jaxspec.sampling import Sampling

TWO = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
V, N, PROMPT = 4, 4, [2, 0]
SHAPE = transformer.Config((24, 4), 24, 16, 3, 2, 1, 8, 24)


@functools.cache
def found():
    """What the program on two devices printed."""
    program = pathlib.Path(__file__).with_name("mirror_program.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=os.environ | TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def law():
    """The probability of each continuation of N tokens under the target."""
    return test_speculate.sequence_probs(Sampling(), PROMPT, V, N, fakes.table(3, V))


@pytest.mark.parametrize("candidates", [1, V])
def test_branches_keep_the_law_of_the_exact_rule(candidates):
    ran = found()["law"][f"exact {candidates}"]
    assert ran["same"]
    chi_square.assert_distribution(np.array(ran["tokens"]) @ V ** np.arange(N)[::-1], law())


@pytest.mark.parametrize("candidates", [1, V])
def test_branches_keep_the_law_of_groups(candidates):
    """Of the first token; ids 0 and 1 are one group, whose members the rule does not tell apart."""
    ran = found()["law"][f"coarse-grained {candidates}"]
    assert ran["same"]
    group = np.array([0, 0, 1, 2])
    probs = np.zeros(3)
    np.add.at(probs, group, law().reshape(V, -1).sum(1))
    chi_square.assert_distribution(group[np.array(ran["tokens"])[:, 0]], probs)


def test_branches_are_reused_and_change_no_token():
    assert all(found()["law"][f"{rule} {V}"]["missed"] == 0 for rule in ("exact", "coarse-grained"))  # every token is a candidate
    runs = found()["alone"]
    assert all(same for _, _, same in runs)
    assert 0 < sum(reused for _, reused, _ in runs) < sum(rounds - 1 for rounds, _, _ in runs)


def test_a_branch_is_what_the_draft_proposes_after_its_tokens():
    """The tokens of a branch have the distributions that are reported for them, which are the draft's after its prefix."""
    ran, params = found()["branches"], fakes.table(3, V) + fakes.table(4, V, scale=0.7)
    drafted, tokens = np.array(ran["drafted"]), np.array(ran["tokens"])
    for place, guess in enumerate([0, 2, 1]):
        prefix = [*PROMPT, *drafted[0, :place], guess]
        rows = (drafted[:, :place] == drafted[0, :place]).all(1)
        for i in range(2):
            expected = jax.nn.softmax(params[fakes.prefix_hash(prefix)])
            np.testing.assert_allclose(ran["probs"][place][i], expected, atol=1e-6)
            chi_square.assert_distribution(tokens[rows, place, i], expected)
            rows &= tokens[:, place, i] == tokens[0, place, i]
            prefix.append(tokens[0, place, i])


def test_a_transformer_in_two_parts_emits_the_plain_loops_tokens():
    ran = found()["real"]
    assert ran["same"]
    assert ran["greedy"]


@pytest.mark.slow
def test_say_and_bench_take_a_mirror(tmp_path):
    """The same codes as without it; the bench has its row beside that of the loop without branches."""

    def jaxspec(*arguments):
        command = [sys.executable, "-m", "jaxspec.commands.main", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | TWO)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    target = checkpoints.converted(tmp_path, "llasa", head="speech")
    draft = checkpoints.converted(tmp_path, "llasa", head="speech", layers=(1, 2))
    pair = "--model", target, "--draft", draft, "--max-codes", 20
    for name, options in (("with.npy", ("--mirror", "draft=1,candidates=2")), ("without.npy", ())):
        jaxspec("say", "The rain has stopped.", *pair, "--out", tmp_path / name, *options)
    np.testing.assert_array_equal(np.load(tmp_path / "with.npy"), np.load(tmp_path / "without.npy"))
    bench = "bench", "--preset", target, "--draft", draft, "--new-tokens", 16, "--repeats", 2, "--verify", "exact"
    printed = jaxspec(*bench, "--mirror", "draft=1,candidates=8", "--json", "--out-dir", tmp_path / "bench")
    plain, without, mirrored = json.loads(printed)["rows"]
    assert (plain["rule"], without["mirror"], mirrored["mirror"]) == ("autoregressive", "", "draft=1,candidates=8")
    assert 0 <= mirrored["reused"] <= 1
    assert mirrored["tokens_per_round"] == without["tokens_per_round"]
    assert mirrored["compilations_after_warm_up"] == 0
    assert "mirror draft=1,candidates=8" in (tmp_path / "bench" / "bench.md").read_text()


@pytest.mark.parametrize("text", ["", "draft", "draft=0", "candidates=4", "draft=1,draft=2", "draft=1,kappa=2", "auto"])
def test_options_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="expected draft=N for N devices, with candidates=C and exit=L"):
        mirror.parse(text)


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match="expected at most 1 devices, which there are, for the target and the draft, got 3"):
        mirror.meshes(2, among=jax.devices()[:1])


@pytest.mark.parametrize("layers", [0, 3, 4])
def test_an_exit_without_a_layer_before_and_after_it_is_refused(layers):
    with pytest.raises(ValueError, match=f"expected an exit after 1 to 2 of 3 layers, got {layers}"):
        transformer.split(SHAPE, layers)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["say", "hello", "--out"], "expected a draft that is a model of its own"),
        (["bench", "--preset", "small", "--synthetic-acceptance", "0.5", "--out-dir"], "expected at most 1 devices"),
    ],
)
def test_the_commands_refuse_what_cannot_be(command, reason, tmp_path):
    code, out, err = commands.run(*command, tmp_path / "a.wav", "--mirror", "draft=1")
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
