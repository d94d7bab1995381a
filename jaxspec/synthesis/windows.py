"""Sound while the codes still come: the codes of a piece in windows that a codec decodes, crossing as far as it looks around.

A codec whose frames depend on L frames before them and R after them gives, for the middle of a window with L and R frames beside
it, the samples of the whole. Where it looks at all of them, the whole piece is one window.
"""

from typing import NamedTuple

import numpy as np

from jaxspec.synthesis.contract import Synthesizer
from jaxspec.synthesis.slots import Row

FIRST_CODES = 10  # of sound in the first chunk
MOST_CODES = 60  # in any: windows have few lengths, so that few programs are compiled


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
        first_codes: how many codes the first chunk of sound has; each further one has twice as many, up to ``MOST_CODES``.
    """

    def __init__(self, synthesizer: Synthesizer, first_codes: int = FIRST_CODES):
        self._codes_of, self._context = synthesizer.codes, synthesizer.context_frames
        self._size, self._sent = first_codes, 0

    def take(self, row: Row) -> list[Window]:
        """The windows that can be decoded by now; all that is left once the row has finished."""
        left, right = self._context
        if row.running and (left is None or right is None):
            return []
        codes, places = self._codes_of(row.tokens)
        taken, many = [], codes[0].size if len(codes) else 1  # a frame may have several codes
        ready = len(codes) - right if row.running and right is not None else len(codes)
        while ready > self._sent and (not row.running or (ready - self._sent) * many >= self._size):
            most = max(self._size if row.running else MOST_CODES, 1)
            last = ready if left is None or right is None else min(self._sent + -(-most // many), ready)
            begin = 0 if left is None else max(self._sent - left, 0)
            end = len(codes) if right is None else min(last + right, len(codes))
            origin = np.asarray(row.origin)[places[self._sent : last]]
            taken.append(Window(codes[begin:end], origin, self._sent - begin, last - begin))
            self._sent, self._size = last, min(2 * self._size, MOST_CODES)
        return taken
