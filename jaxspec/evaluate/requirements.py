"""What an evaluation needs beyond jaxspec's own dependencies, checked before any work is done."""

import importlib.util
import shutil

PROGRAM = "flite"
# webrtcvad, which resemblyzer uses, imports pkg_resources: setuptools below 81 has it.
MODULES = ("jiwer", "pocketsphinx", "resemblyzer", "pkg_resources")


def check() -> None:
    """Checks that flite and the Python packages of the extra ``eval`` are installed; imports none of them.

    Raises:
        RuntimeError: some are missing. The message names all of them and how to install them.
    """
    modules = [name for name in MODULES if importlib.util.find_spec(name) is None]
    program = [] if shutil.which(PROGRAM) else [PROGRAM]
    if program or modules:
        install = ["apt-get install flite"] * bool(program) + ["pip install 'jaxspec[eval]'"] * bool(modules)
        raise RuntimeError(
            f"expected {', '.join((PROGRAM, *MODULES))} to be installed, got no {', no '.join(program + modules)}: "
            f"run {' and '.join(install)}"
        )
