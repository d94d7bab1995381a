"""Sound while the codes still come: the codes of a piece in windows that a codec decodes, crossing as far as it looks around.

A codec whose frames depend on L frames before them and R after them gives, for the middle of a window with L and R frames beside
it, the samples of the whole. One that decodes growing pieces is given all the codes so far. Where a codec can do neither, the
whole piece is one window.
"""

from typing import NamedTuple

import numpy as np

from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.slots import Row

FIRST_CODES = 10  # of sound in the first chunk
MOST_CODES = 60  # in any: windows have few lengths, so that few programs are compiled
_ALL = 2**30  # frames of context of a codec that looks at the whole row


class Window(NamedTuple):
    """Codes to decode, of which those from ``first`` to ``last`` are new."""

    codes: np.ndarray  # int32 [T] or [T Q]
    origin: np.ndarray  # int8, of the new codes
    first: int
    last: int

    def cut(self, wave: np.ndarray) -> np.ndarray:
        """Of the window's wave the part of the new codes, within -1 .. 1."""
        if (self.first, self.last) != (0, len(self.codes)):
            span = len(wave) // len(self.codes)
            wave = wave[self.first * span : self.last * span]
        return np.clip(wave, -1, 1)


class Windows:
    """The windows of one piece of text.

    Args:
        synthesizer: whose codes and context.
        settings: of the piece.
        first_codes: how many codes the first chunk of sound has; each further one has twice as many, up to ``MOST_CODES``.
    """

    def __init__(self, synthesizer: Synthesizer, settings: Settings, first_codes: int = FIRST_CODES):
        self._codes_of = synthesizer.codes
        self._left, self._right = (_ALL if side is None else side for side in synthesizer.context_frames)
        self._settled, self._settings = synthesizer.settled, settings
        self._size, self._sent = first_codes, 0

    def take(self, row: Row) -> list[Window]:
        """The windows that can be decoded by now; all that is left once the row has finished."""
        codes, places = self._codes_of(row.tokens)
        taken, many = [], codes[0].size if len(codes) else 1  # a frame may have several codes
        ready = self._ready(len(codes)) if row.running else len(codes)
        while ready > self._sent and (not row.running or (ready - self._sent) * many >= self._size):
            most = max(self._size if row.running else MOST_CODES, 1)
            last = ready if self._right == _ALL else min(self._sent + -(-most // many), ready)
            begin, end = max(self._sent - self._left, 0), min(last + self._right, len(codes))
            origin = np.asarray(row.origin)[places[self._sent : last]]
            taken.append(Window(codes[begin:end], origin, self._sent - begin, last - begin))
            self._sent, self._size = last, min(2 * self._size, MOST_CODES)
        return taken

    def _ready(self, count: int) -> int:
        """Of how many of ``count`` codes the sound is final while more come."""
        return self._settled(count, self._settings) if self._settled else max(count - self._right, 0)
