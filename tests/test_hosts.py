"""Several hosts as processes of four CPU devices each, which talk by gloo: the tokens of one device, and one end for all.

Run by hand: pytest -m slow -n 0 tests/test_hosts.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxspec.train import log

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).parent / "host_programs.py"
COMMAND = (sys.executable, "-m", "jaxspec.commands.main")
DEAD = "jaxspec: expected every host to go on, but one died or cannot be reached"


class Hosts:
    """Two processes that run the same command; one host where ``count`` is 1.

    Args:
        command: of each.
        folders: where each runs.
        count: of hosts.
        devices: of each.
    """

    def __init__(self, command, folders, count=2, devices=4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        root = str(PROGRAMS.parent.parent)
        common = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root} | cluster
        self.began = time.monotonic()
        self.processes = [
            subprocess.Popen(
                [str(word) for word in command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folders[index],
                env=common | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
            )
            for index in range(count)
        ]

    def results(self, timeout=500):
        """The exit code, standard output and standard error of each."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]

    def wait_for(self, paths, timeout=300):
        """Waits until all files exist."""
        until = time.monotonic() + timeout
        while not all(path.exists() for path in paths):
            assert time.monotonic() < until, [process.poll() for process in self.processes]
            time.sleep(0.1)


def program(name, folder, count=2, devices=4):
    """Runs a program of ``host_programs.py``."""
    folder.mkdir(exist_ok=True)
    return Hosts([sys.executable, PROGRAMS, name, folder], [folder] * count, count, devices)


def test_generate_gives_the_tokens_of_one_device(tmp_path):
    assert [code for code, *_ in program("generate", tmp_path).results()] == [0, 0]
    assert program("generate", tmp_path, 1, 1).results()[0][0] == 0
    two, one = (np.load(tmp_path / f"tokens-{count}.npz") for count in (2, 1))
    assert one["length"].min() > 3
    for name in ("tokens", "length"):
        np.testing.assert_array_equal(two[name], one[name])


def test_training_goes_on_where_it_stopped_on_another_mesh(tmp_path):
    """Two hosts of four devices write the checkpoint of the second step; one host of two goes on, as if it had trained alone."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert program("train", alone, 1, 1).results()[0][0] == 0
    stopped = program("train_until_stopped", together).results()
    assert [code for code, *_ in stopped] == [2, 2]
    assert stopped[0][2].count("expected to be stopped after 3 steps") == 1
    assert [path.name for path in (together / "run" / "checkpoints").iterdir()] == ["2"]
    assert len(log.read(together / "run")) == 3
    assert program("train", together, 1, 2).results()[0][0] == 0
    np.testing.assert_allclose(np.load(together / "weights.npy"), np.load(alone / "weights.npy"), rtol=1e-6)
    losses = [[row["loss"] for row in log.read(folder / "run")] for folder in (together, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_speech_is_that_of_one_host(tmp_path):
    """The first host has the file of the texts; it alone writes, and says how it went."""
    say = [*COMMAND, "say", "--file", "texts.txt", "--out-dir", "spoken", "--format", "npy", "--json"]
    folders = [tmp_path / name for name in ("first", "second", "one")]
    for folder in folders:
        folder.mkdir()
    for folder in (folders[0], folders[2]):
        (folder / "texts.txt").write_text("Hello there.\nThe rain has stopped.\n")
    (code, out, _), second = Hosts([*say, "--distributed"], folders).results()
    assert (code, second) == (0, (0, "", ""))
    assert json.loads(out)["tokens"] > 10
    assert Hosts(say, folders[2:], 1, 1).results()[0][0] == 0
    for name in ("001.npy", "002.npy"):
        np.testing.assert_array_equal(np.load(folders[0] / "spoken" / name), np.load(folders[2] / "spoken" / name))
    assert not list(folders[1].iterdir())


def test_the_memory_of_loading_a_large_model(tmp_path):
    """LLaSA-8B's shape with 2 layers, in bfloat16: a host holds its half, and little more while it reads."""
    assert program("write", tmp_path, 1, 1).results()[0][0] == 0
    assert [code for code, *_ in program("load", tmp_path).results()] == [0, 0]
    shutil.rmtree(tmp_path / "params")
    for index in (0, 1):
        of_host = json.loads((tmp_path / f"memory-{index}.json").read_text())
        print({name: round(value / 1e9, 3) if name != "host" else value for name, value in of_host.items() if name != "seconds"})
        assert of_host["shards"] < 0.51 * of_host["all"]
        assert of_host["peak"] < 2.1 * of_host["shards"]


@pytest.mark.parametrize("name", ["raises", "raises_through_a_call"])
def test_an_error_on_one_host_ends_all_with_one_message(tmp_path, name):
    hosts = program(name, tmp_path)
    results = hosts.results(timeout=120)
    assert [code for code, *_ in results] == [2, 2]
    assert [err for *_, err in results] == ["jaxspec: host 1: expected a good host, got a bad one: repair it\n", ""]


def test_a_checkpoint_that_one_host_cannot_see_is_one_sentence(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "model").mkdir()
    (folders[0] / "model" / "jaxspec.json").write_text("{}")  # the first host finds something, the second nothing
    say = [*COMMAND, "say", "Hello.", "--model", "model", "--out", "out.npy", "--distributed"]
    results = Hosts(say, folders).results(timeout=200)
    assert [code for code, *_ in results] == [2, 2]
    (_, out, err), second = results
    assert (out, second[1:]) == ("", ("", ""))
    assert err.startswith("jaxspec: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("name", "dies"), [("waits", 0), ("waits", 1), ("collect", 1)])
def test_the_death_of_a_host_ends_the_other_with_a_sentence(tmp_path, name, dies):
    hosts = program(name, tmp_path)
    hosts.wait_for([tmp_path / f"alive-{index}" for index in (0, 1)])
    hosts.processes[dies].send_signal(signal.SIGKILL)
    died = time.monotonic()
    results = hosts.results(timeout=120)
    assert time.monotonic() - died < 60
    code, out, err = results[1 - dies]
    assert (code, out) == (2, "")
    assert err.startswith(DEAD)
    assert err.count("\n") == 1


def test_one_host_that_is_asked_to_join_others_is_a_sentence(tmp_path):
    say = [*COMMAND, "say", "Hello.", "--out", "hello.wav", "--distributed"]
    code, out, err = Hosts(say, [tmp_path], 1).results()[0]
    assert (code, out) == (2, "")
    assert err.startswith("jaxspec: expected --distributed on hosts of Cloud TPU or Slurm, or with JAX_COORDINATOR_ADDRESS")
    assert err.count("\n") == 1


def test_a_host_that_is_missing_is_a_sentence(tmp_path):
    """The hosts wait for it; here for two seconds."""
    late = "from jaxspec.common import hosts; hosts._JOIN_S = 2; hosts.join()"
    hosts = Hosts([sys.executable, "-c", late], [tmp_path, tmp_path])
    hosts.processes[1].kill()
    code, _, err = hosts.results()[0]
    assert code == 2
    assert err.startswith("jaxspec: expected every host to join")
