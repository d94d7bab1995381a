"""The slots of one rule: which job is in which, and the windows of its sound."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxspec.serve.job import Job
from jaxspec.state import NON_FINITE
from jaxspec.synthesis.contract import Synthesizer
from jaxspec.synthesis.decoding import Decoding
from jaxspec.synthesis.pipeline import row_keys
from jaxspec.synthesis.slots import Row, Slots, row_request
from jaxspec.synthesis.windows import Window, Windows


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that programs are compiled for.

    slots: rows of each rule that are decoded together.
    prompt_widths: to which prompts are padded, in rising order.
    max_codes: the most tokens of a piece of text.
    num_stops: stop ids of a request.
    """

    slots: int
    prompt_widths: tuple[int, ...]
    max_codes: int
    num_stops: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many rows a call computes: 1, 4, 16 ... below the number of slots."""
        return tuple(4**power for power in range(8) if 4**power < self.slots)

    def width(self, prompt_length: int) -> int:
        """The smallest width that a prompt fits."""
        return next(width for width in self.prompt_widths if width >= prompt_length)


class News(NamedTuple):
    """What became of a job in a call: windows to decode, and whether its last piece has finished."""

    job: Job
    windows: list[Window]
    finished: bool
    non_finite: bool


class Lane:
    """A rule's slots.

    Args:
        synthesizer: the model and its codec.
        decoding: the rule.
        shapes: the sizes that programs are compiled for.
        first_codes: of the first chunk of a piece.
    """

    def __init__(self, synthesizer: Synthesizer, decoding: Decoding, shapes: Shapes, first_codes: int):
        self._synthesizer, self._decoding, self._shapes, self._first_codes = synthesizer, decoding, shapes, first_codes
        self._jobs: dict[Row, tuple[Job, Windows]] = {}
        self.slots = self._empty()

    def _empty(self) -> Slots:
        shapes = self._shapes
        cells = shapes.prompt_widths[-1] + shapes.max_codes + self._decoding.draft_length + 1
        return Slots(self._synthesizer, self._decoding, shapes.slots, cells, shapes.num_stops, shapes.sizes)

    def reset(self) -> list[Job]:
        """Empties all slots after a failure of the device; returns the jobs that were in them."""
        lost, self._jobs, self.slots = [job for job, _ in self._jobs.values()], {}, self._empty()
        return lost

    @property
    def used(self) -> int:
        """How many slots are in use."""
        return sum(row is not None for row in self.slots.rows)

    @property
    def free(self) -> bool:
        """Whether a slot is empty."""
        return self.used < len(self.slots.rows)

    @property
    def busy(self) -> bool:
        """Whether there is something to run or to read."""
        return bool(self.used or self.slots.unread)

    @property
    def leaked(self) -> int:
        """How many slots are in use by no job, or by one that has ended and has been seen to: it should be 0."""
        return sum(row is not None and row not in self._jobs for row in self.slots.rows)

    def admit(self, job: Job) -> None:
        """Puts the next piece of a job into an empty slot.

        Raises:
            ValueError: it does not fit.
        """
        piece = job.next_piece
        width = self._shapes.width(int(job.requests.prompt_length[piece]))
        keys = row_keys(job.settings.key(), np.array([piece], np.uint32))
        row = self.slots.admit(row_request(self._synthesizer, job.requests, piece, keys, width))
        job.next_piece += 1
        self._jobs[row] = job, Windows(self._synthesizer, job.settings, self._first_codes)

    def drop_ended(self) -> None:
        """Empties the slots of jobs that have ended early."""
        for row in [row for row, (job, _) in self._jobs.items() if job.ended.is_set()]:
            self.slots.release(row)
            del self._jobs[row]

    def step(self, rounds: int) -> list[News]:
        """Starts some rounds, and reads those before them; the next piece of a job takes the slot of the one before it."""
        if self.used:
            self.slots.advance(rounds)
            if self.slots.unread < 2:
                return []
        return [self._news(row) for row in list(self.slots.read())]

    def _news(self, row: Row) -> News:
        job, windows = self._jobs[row]
        taken = windows.take(row)
        finished, non_finite = False, row.stop_reason == NON_FINITE
        if not row.running:
            del self._jobs[row]
            job.generations.append(row.generation())
            finished = job.next_piece == job.num_pieces
            if not finished and not non_finite and not job.ended.is_set():
                self.admit(job)
        return News(job, taken, finished, non_finite)
