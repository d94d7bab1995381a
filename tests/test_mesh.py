"""A mesh changes no token: every rule, drafter and sampling option on 8 CPU devices; and what is refused."""

import json
import os
import pathlib
import subprocess
import sys

import commands
import jax
import mesh_program
import pytest

from jaxspec import mesh

EIGHT = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
SOME = [("block:coarse-grained", "2x4"), ("plain:", "8x1")]
ALL = [f"{draft}:exact" for draft in ("ngram", *mesh_program.CONFIGS)] + [f"model:{rule}" for rule in mesh_program.RULES]


def run(program, *arguments):
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, env=os.environ | EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(cases, meshes):
    found = json.loads(run(str(pathlib.Path(mesh_program.__file__)), meshes, cases))
    assert len(found) == len(cases.split(",")) * len(meshes.split(","))
    assert [name for name, same in found.items() if not same] == []


@pytest.mark.parametrize(("cases", "meshes"), SOME)
def test_a_mesh_changes_no_token_and_compiles_once(cases, meshes):
    """Ragged prompts, a row that emits nothing, rows that end early, six rows on meshes of two and of eight parts."""
    check(cases, meshes)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain:", *dict.fromkeys(ALL)])
def test_no_mesh_changes_a_token(case):
    check(case, "1x8,2x4,8x1")


class Device:
    def __init__(self, number, host):
        self.id, self.process_index, self.device_kind, self.platform = number, host, "cpu", "cpu"

    def __repr__(self):
        return f"{self.process_index}.{self.id}"


HOSTS = [Device(number, number // 4) for number in range(16)]


@pytest.mark.parametrize(("data", "model"), [(4, 4), (8, 2), (2, 2), (3, 4), (2, 8), (1, 16), (16, 1)])
def test_a_row_of_the_model_axis_stays_on_its_host_where_it_fits(data, model):
    made = mesh.make(data, model, HOSTS)
    assert made.devices.shape == (data, model)
    assert len({device.id for device in made.devices.flat}) == data * model
    assert all(len({device.process_index for device in row}) == max(1, model // 4) for row in made.devices)


@pytest.mark.parametrize(
    ("megabytes", "divided", "expected"),
    [
        (16_000, (8, 32, 66_560), (4, 4)),
        (16_000, (2, 14, 66_560), (8, 2)),
        (16_000, (8, 32, 65_537), (16, 1)),
        (300, (8, 8), (8, 2)),
        (9, (8, 8), (16, 1)),
    ],
)
def test_an_automatic_mesh(megabytes, divided, expected):
    assert mesh.automatic(megabytes * 10**6, divided, HOSTS).devices.shape == expected


def test_without_a_mesh_nothing_is_divided():
    assert mesh.current() is None
    with jax.set_mesh(mesh.make()):
        assert mesh.current() is None
        assert mesh.multiple(3) == 3


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=2;model=4", "date=2", "data=2,modell=4", "data=2,data=2", "auto=1"])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="expected a mesh such as data=2,model=4, with the axes data and model, got"):
        mesh.parse(text)


@pytest.mark.parametrize("command", [["say", "hello", "--out"], ["bench", "--out-dir"], ["evaluate", "--out-dir"]])
def test_more_chips_than_there_are_are_refused(command, tmp_path):
    code, out, err = commands.run(*command, tmp_path / "a.wav", "--mesh", "data=2,model=64")
    assert (code, out) == (2, "")
    assert err.startswith("jaxspec: expected a mesh of at most ")
    assert list(tmp_path.iterdir()) == []
