"""The command line: `jaxspec COMMAND`; each command is a dataclass of arguments with a `run`."""

import _thread
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import threading
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import jax
import tyro

import jaxspec
from jaxspec.common.compilation_cache import use_compilation_cache
from jaxspec.text import TextWarning

_DEVICES = Path("/dev")
_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1:]
# Each a module and its class.
COMMANDS = (
    "say",
    "voice",
    "encode",
    "convert",
    "info",
    "groups",
    "evaluate",
    "bench",
    "plan",
    "sample",
    "train-draft",
    "tune",
    "serve",
)


def main() -> None:
    """The entry point of the command ``jaxspec``; exits with 2 when the input is at fault, with 130 when interrupted."""
    try:
        if "--version" in sys.argv[1:2]:
            print(f"jaxspec {jaxspec.__version__}")
            return
        command = parse(sys.argv[1:])
        leave_absent_tpu_alone()
        use_compilation_cache()
        show_text_warnings()
        sys.unraisablehook = interrupt_again
        with getattr(command, "on_mesh", contextlib.nullcontext)():
            command.run()
    except KeyboardInterrupt as interrupt:
        print("jaxspec: interrupted" + "".join(f"; {part}" for part in interrupt.args), file=sys.stderr)
        sys.exit(130)
    except (ValueError, ImportError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"jaxspec: {error}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: list[str]) -> Any:
    """The command that the arguments name, with its arguments; only its own module is imported."""
    config = (tyro.conf.FlagCreatePairsOff,)
    if arguments and arguments[0] in COMMANDS:
        return tyro.cli(_command(arguments[0]), prog=f"jaxspec {arguments[0]}", args=arguments[1:], config=config)
    commands = {name: _command(name) for name in COMMANDS}
    about = "Speculative decoding for speech-token models. `jaxspec --version` prints the version."
    return tyro.extras.subcommand_cli_from_dict(commands, prog="jaxspec", description=about, args=arguments, config=config)


@functools.cache
def _command(name: str) -> type:
    """The class of a command, its help without "None": an argument that may be left out says in its text what happens then."""
    module = importlib.import_module(f"jaxspec.commands.{name.replace('-', '_')}")
    command = getattr(module, name.title().replace("-", ""))
    kinds = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        plain, *marks = typing.get_args(kinds[field.name]) if "Annotated" in str(kinds[field.name]) else (kinds[field.name],)
        metavar = _metavar(plain)
        if metavar and any(mark in marks for mark in _POSITIONAL):
            metavar = f"[{metavar}]"
        hint = "" if field.default is None or field.default == "" or plain is bool else None
        shown = tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)
        command.__annotations__[field.name] = typing.Annotated[(plain, shown, *marks)]
    return command


def _metavar(kind: Any) -> str | None:
    """How help names the value of an argument that may be None: PATH, TEXT, INT, FLOAT, or its choices."""
    choices = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if typing.get_origin(kind) not in (types.UnionType, typing.Union) or len(choices) != 1:
        return None
    if typing.get_origin(choices[0]) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(choices[0]))) + "}"
    return {Path: "PATH", str: "TEXT"}.get(choices[0], choices[0].__name__.upper())


def leave_absent_tpu_alone() -> None:
    """Chooses the CPU where libtpu is installed but neither a TPU nor another accelerator's plugin is: libtpu prints errors then.

    Nothing is chosen where JAX_PLATFORMS is set, where a device node of a TPU exists, or where a plugin could find a GPU.
    """
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if chosen or "JAX_PLATFORMS" in os.environ or "TPU_NAME" in os.environ:
        return
    nodes = [*_DEVICES.glob("accel*"), *_DEVICES.glob("vfio")]
    if not nodes and not _accelerator_plugins():
        jax.config.update("jax_platforms", "cpu")


def _accelerator_plugins() -> list[str]:
    """The names of JAX's installed plugins, which register GPUs and others."""
    package = importlib.util.find_spec("jax_plugins")
    folders = package.submodule_search_locations if package else None
    found = [module.name for module in pkgutil.iter_modules(folders or [])]
    return found + [point.name for point in importlib.metadata.entry_points(group="jax_plugins")]


def interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupts again where an interrupt came in a callback of the garbage collector (JAX has one), which would ignore it."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def show_text_warnings() -> None:
    """Prints each part of a text that was skipped or broken up as one line on standard error, once in a run."""
    warnings.simplefilter("default", TextWarning)
    as_usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        shown = f"jaxspec: {message}\n"
        return shown if issubclass(category, TextWarning) else as_usual(message, category, filename, lineno, line)

    warnings.formatwarning = one_line


if __name__ == "__main__":
    main()
