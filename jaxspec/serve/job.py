"""A request to the engine: its pieces of text, its state, and the events that its listener is given."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxspec.state import Generation
from jaxspec.synthesis.contract import Requests, Settings


class Refused(Exception):  # noqa: N818, it is what a server answers
    """A request that is not served: the HTTP status, and a sentence that says what to do."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class Sound(NamedTuple):
    """A chunk of speech and the origin of its codes, see ``jaxspec.state``."""

    wave: np.ndarray  # float32 [N]
    origin: np.ndarray  # int8 [T] or [T Q]


class Done(NamedTuple):
    """The end of a request that went well, and its counts, see ``pipeline.count``."""

    counts: dict[str, Any]


class Failed(NamedTuple):
    """The end of a request that did not."""

    error: Refused


Event = Sound | Done | Failed
Listener = Callable[[Event], None]


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine.

    ``listen`` is called with events, from threads of the engine: any number of Sound, then one Done or Failed, and nothing after
    ``cancel``.
    """

    rule: str
    settings: Settings
    requests: Requests  # a row for each piece
    listen: Listener
    deadline_s: float  # on the monotonic clock
    began_s: float = dataclasses.field(default_factory=time.monotonic)
    next_piece: int = 0
    num_samples: int = 0  # of sound that was told
    generations: list[Generation] = dataclasses.field(default_factory=list)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    outcome: str = ""  # "finished", "failed" or "cancelled", once it has ended
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def num_pieces(self) -> int:
        """How many pieces of text it has."""
        return len(self.requests.limit)

    def tell(self, sound: Sound) -> None:
        """Gives sound to the listener unless the job has ended."""
        with self._lock:
            if not self.ended.is_set():
                self.num_samples += len(sound.wave)
                self.listen(sound)

    def end(self, outcome: str, event: Done | Failed | None = None) -> bool:
        """Ends the job once; True if this call did."""
        with self._lock:
            if self.ended.is_set():
                return False
            self.outcome = outcome
            self.ended.set()
            if event is not None:
                self.listen(event)
            return True
