"""The command line: `jaxspec COMMAND`; each command is a dataclass of arguments with a `run`."""

import os
import sys
import warnings
from pathlib import Path

import jax
import tyro

from jaxspec.commands.bench import Bench
from jaxspec.commands.convert import Convert
from jaxspec.commands.evaluate import Evaluate
from jaxspec.commands.groups import Groups
from jaxspec.commands.info import Info
from jaxspec.commands.plan import Plan
from jaxspec.commands.say import Say
from jaxspec.text import TextWarning


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts quickly."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxspec"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def show_text_warnings() -> None:
    """Prints each part of a text that was skipped or broken up as one line on standard error, once in a run."""
    warnings.simplefilter("default", TextWarning)
    as_usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
        return f"jaxspec: {message}\n" if issubclass(category, TextWarning) else as_usual(message, category, *place, **more)

    warnings.formatwarning = one_line


def main() -> None:
    """The entry point of the command ``jaxspec``; exits with 2 when the input is at fault."""
    commands = {
        "say": Say,
        "convert": Convert,
        "info": Info,
        "groups": Groups,
        "evaluate": Evaluate,
        "bench": Bench,
        "plan": Plan,
    }
    parsed = tyro.extras.subcommand_cli_from_dict(
        commands, prog="jaxspec", description="Speculative decoding for speech-token models."
    )
    use_compilation_cache()
    show_text_warnings()
    try:
        parsed.run()
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"jaxspec: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
