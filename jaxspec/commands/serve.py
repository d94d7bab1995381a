"""The command `serve`: speech over HTTP, as OpenAI's clients ask for it, and over Wyoming."""

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path

from jaxspec.commands.console import progress_bar
from jaxspec.serve.engine import Engine, Limits
from jaxspec.synthesis.decoding import PLAIN
from jaxspec.synthesis.load import load
from jaxspec.text import TextWarning

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEY = "JAXSPEC_API_KEY"


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves speech: POST /v1/audio/speech, and a page to try it at /."""

    model: Path | None = None
    """A checkpoint that `jaxspec convert` made; by default the built-in voice."""
    draft: str | None = None
    """ngram, or the folder of a draft for the model; by default the built-in voice's own, and none for a model."""
    codec: Path | None = None
    """The folder of the model's codec; by default the folder codec in that of the model."""
    host: str = "127.0.0.1"
    """The address to listen at; any other than this machine's own needs --api-key."""
    port: int = 8000
    """The port to listen at."""
    api_key: str | None = None
    """The key that clients must bring; by default JAXSPEC_API_KEY in the environment, where others cannot read it."""
    insecure: bool = False
    """Listen at an address that others reach without a key."""
    rules: str | None = None
    """The verifiers that requests may name, the default one first; by default exact,coarse-grained,autoregressive, and
    autoregressive without a draft."""
    slots: int = 16
    """How many requests of each rule are decoded together."""
    rounds: int = 2
    """How many rounds run between two looks of the host."""
    max_queue: int = 64
    """How many requests may wait; more are refused with status 429."""
    max_text: int = 4096
    """The most characters of a request's text."""
    max_prompt: int | None = None
    """The most tokens of a prompt; by default as many as the longest piece of a text has, without a reference."""
    max_codes: int | None = None
    """The most tokens of each piece of a text; by default the model's own limit."""
    max_body_mb: float = 8.0
    """The most megabytes of a request."""
    request_s: float = 300.0
    """The most seconds that a request may take."""
    drain_s: float = 60.0
    """How long to finish accepted requests for when asked to end (SIGTERM)."""
    wyoming_port: int | None = None
    """Also speak the Wyoming protocol (Home Assistant) at this port; by default not."""
    log_texts: bool = False
    """Say in the log what is spoken; by default the log holds no text of users."""

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT."""
        api_key = self.api_key or os.environ.get(_KEY) or None
        if self.host not in _LOOPBACK and api_key is None and not self.insecure:
            raise ValueError(
                f"expected --api-key (or {_KEY}) for the address {self.host}, got none: others can reach it; or --insecure"
            )
        if self.wyoming_port is not None and self.host not in _LOOPBACK and not self.insecure:
            raise ValueError(f"expected --insecure with --wyoming-port at the address {self.host}: that protocol has no key")
        try:
            from jaxspec.serve import server
        except ImportError as error:
            raise ImportError(f"serving needs more packages ({error}): pip install 'jaxspec[serve]'") from error

        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        warnings.simplefilter("ignore", TextWarning)  # they quote the texts
        sockets = server.bind(self.host, [self.port, *([self.wyoming_port] if self.wyoming_port is not None else [])])
        synthesizer = load(self.model, self.draft, self.codec)
        names = {field.name for field in dataclasses.fields(Limits)} & set(vars(self))
        limits = Limits(**{name: getattr(self, name) for name in names})
        engine = Engine(synthesizer, self._rules(synthesizer.drafter is not None), limits)
        front = server.Front(
            model=self.model.name if self.model else "jaxspec",
            api_key=api_key,
            max_body=int(self.max_body_mb * 2**20),
            log_texts=self.log_texts,
        )
        with progress_bar("warming up") as progress:
            server.serve(engine, front, sockets, self.drain_s, progress if sys.stderr.isatty() else _log_progress)

    def _rules(self, drafted: bool) -> tuple[str, ...]:
        if self.rules is None:
            return ("exact", "coarse-grained", PLAIN) if drafted else (PLAIN,)
        names = tuple(name.strip() for name in self.rules.split(","))
        if len(set(names)) != len(names) or "auto" in names:
            raise ValueError(f"expected --rules with different verifiers, got {self.rules}: auto needs no naming")
        return names


def _log_progress(done: int, total: int) -> None:
    logging.getLogger("jaxspec.serve").info("warming up: %d of %d steps", done, total)
