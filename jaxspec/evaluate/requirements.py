"""What an evaluation needs beyond jaxspec's own dependencies, checked before any work is done."""

import importlib.util
import shutil
import subprocess
import sys

from jaxspec.evaluate import naturalness
from jaxspec.evaluate.recognize import PACKAGES, Recognizer

PROGRAM = "flite"
# webrtcvad, which resemblyzer uses, imports pkg_resources: setuptools below 81 has it.
MODULES = ("jiwer", "resemblyzer", "pkg_resources", *naturalness.PACKAGES)


def check(recognizer: Recognizer) -> None:
    """Checks that flite and the Python packages of the extra ``eval`` are installed; imports none of them into this process.

    Distill-MOS, of the extra ``mos``, may be missing. Where it is installed it must import, which torchaudio does not beside a
    torch of another build.

    Args:
        recognizer: the one that is needed.

    Raises:
        RuntimeError: some are missing, the message names all of them and how to install them; or Distill-MOS does not import.
    """
    needed = (*MODULES, PACKAGES[recognizer])
    modules = [name for name in needed if importlib.util.find_spec(name) is None]
    program = [] if shutil.which(PROGRAM) else [PROGRAM]
    if program or modules:
        install = ["apt-get install flite"] * bool(program) + ["pip install 'jaxspec[eval]'"] * bool(modules)
        if PACKAGES["moonshine"] in modules:
            install.append("use --recognizer pocketsphinx where Moonshine has no package (other than Linux on x86-64)")
        raise RuntimeError(
            f"expected {', '.join((PROGRAM, *needed))} to be installed, got no {', no '.join(program + modules)}: "
            f"{' and '.join(install)}"
        )
    if naturalness.has_distill_mos():
        tried = subprocess.run([sys.executable, "-P", "-c", "import distillmos"], capture_output=True, text=True, check=False)
        if tried.returncode:
            reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
            raise RuntimeError(
                f"expected distillmos to import, got {reason}: install torchaudio from where torch comes from, or uninstall "
                "distillmos"
            )
