"""The front of the command line: help, version, interrupts, and which devices are looked for."""

import signal
import time
import types
from unittest import mock

import commands
import pytest

import jaxspec
from jaxspec.commands import main as cli
from jaxspec.commands.info import Info


def test_the_version_is_printed():
    assert commands.run("--version") == (0, f"jaxspec {jaxspec.__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_no_none_and_one_default(command):
    code, printed, _ = commands.run(command, "--help")
    assert code == 0
    assert "None" not in printed
    assert printed.startswith(f"usage: jaxspec {command} ")


def test_help_names_every_command():
    code, printed, _ = commands.run("--help")
    assert code == 0
    assert all(f"• {command} " in printed for command in cli.COMMANDS)


def test_an_unknown_command_is_refused():
    code, _, err = commands.run("sing")
    assert code == 2
    assert "sing" in err


def test_an_interrupt_is_one_line_for_every_command(monkeypatch, tmp_path):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Info, "run", interrupted)
    assert commands.run("info", tmp_path) == (130, "", "jaxspec: interrupted\n")


def test_an_interrupt_that_a_callback_ignored_comes_again():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    class Watched:
        def __del__(self):
            raise KeyboardInterrupt

    def work():
        watched = Watched()
        del watched
        time.sleep(5)

    try:
        with mock.patch("sys.unraisablehook", cli.interrupt_again), pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("nodes", "plugins", "variables", "chosen"),
    [
        ([], [], {}, "cpu"),
        (["accel0"], [], {}, None),
        (["vfio"], [], {}, None),
        ([], ["cuda"], {}, None),
        ([], [], {"JAX_PLATFORMS": "tpu"}, None),
        ([], [], {"TPU_NAME": "local"}, None),
    ],
)
def test_the_cpu_is_chosen_only_where_nothing_else_can_be(monkeypatch, tmp_path, nodes, plugins, variables, chosen):
    for node in nodes:
        (tmp_path / node).touch()
    for name in ("JAX_PLATFORMS", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    updates = {}
    monkeypatch.setattr(cli, "_DEVICES", tmp_path)
    monkeypatch.setattr(cli, "_accelerator_plugins", lambda: plugins)
    config = types.SimpleNamespace(jax_platforms=None, update=updates.__setitem__)
    monkeypatch.setattr(cli, "jax", types.SimpleNamespace(config=config))
    cli.leave_absent_tpu_alone()
    assert updates.get("jax_platforms") == chosen
