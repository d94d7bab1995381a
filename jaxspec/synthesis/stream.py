"""Speech in chunks while it is still being decoded: ``pipeline.speak``, one piece of text after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.decoding import Decoding, check_finite, resolve
from jaxspec.synthesis.pipeline import Tally, row_keys
from jaxspec.synthesis.slots import Row, Slots, row_request
from jaxspec.synthesis.windows import FIRST_CODES, Window, Windows
from jaxspec.types import Array


class Chunk(NamedTuple):
    """A part of the speech of a text; joined, the chunks of a text are its ``pipeline.Utterance``."""

    text: int  # the index of the text
    wave: np.ndarray  # float32 [N], -1 .. 1
    codes: np.ndarray  # int32 [T], or [T Q] where a frame has Q codes
    origin: np.ndarray  # int8, as the codes
    sample_rate_hz: int


def stream(
    texts: str | Sequence[str],
    settings: Settings | None = None,
    synthesizer: Synthesizer | None = None,
    decoding: Decoding | None = None,
    *,
    first_codes: int = FIRST_CODES,
    tally: Tally | None = None,
) -> Iterator[Chunk]:
    """Speaks each text, in chunks that come while the codes after them are decoded.

    The tokens are those of ``pipeline.speak`` with the same arguments, up to the rounding of the logits, which the size of a
    batch can change; and so is the sound, but for rounding, where the codec's context is finite. Where it is not, the sound is
    that of the codec's own way to decode growing rows, or else comes piece by piece. "auto" does not try here: it is
    coarse-grained.

    Args:
        texts: one text, or some.
        settings: how to synthesize.
        synthesizer: by default the built-in voice.
        decoding: what ``resolve`` makes of the settings.
        first_codes: of the first chunk of a piece, 1 or more; each further one has twice as many, up to 60.
        tally: to which times and counts are added.

    Returns:
        The chunks in order, a lazy iterator.

    Raises:
        ValueError: a text is empty or cannot be spoken, there is no codec, or, later, the model's logits are not finite.
    """
    settings, synthesizer, tally = settings or Settings(), synthesizer or builtin(), tally or Tally()
    if synthesizer.decode is None:
        raise ValueError("expected a codec for a stream of sound, got none: give --codec")
    if first_codes < 1:
        raise ValueError(f"expected a first chunk of at least 1 code, got {first_codes}: 10 is the default")
    decoding, texts = decoding or resolve(synthesizer, settings), [texts] if isinstance(texts, str) else texts
    pieces = [(index, piece) for index, text in enumerate(texts) for piece in synthesizer.pieces(text)]
    return _chunks(pieces, settings, synthesizer, decoding, first_codes, tally)


def _chunks(
    pieces: list[tuple[int, str]],
    settings: Settings,
    synthesizer: Synthesizer,
    decoding: Decoding,
    first_codes: int,
    tally: Tally,
) -> Iterator[Chunk]:
    rows = _rows([piece for _, piece in pieces], settings, synthesizer, decoding, tally)
    for index, _ in pieces:
        windows = Windows(synthesizer, settings, first_codes)
        for row in rows:
            for window in windows.take(row):
                wave = _decode(window, synthesizer, settings, tally)
                codes = window.codes[window.first : window.last]
                yield Chunk(index, wave, codes, window.origin, synthesizer.sample_rate_hz)
            if not row.running:
                tally.generations.append(row.generation())
                break


def _decode(window: Window, synthesizer: Synthesizer, settings: Settings, tally: Tally) -> np.ndarray:
    assert synthesizer.decode_windows is not None
    return window.cut(synthesizer.decode_windows([window.codes], settings, tally.watch)[0])


def _rows(pieces: list[str], settings: Settings, synthesizer: Synthesizer, decoding: Decoding, tally: Tally) -> Iterator[Row]:
    """Each piece's row after each round, until it has finished; the device is always one round ahead, or a piece."""
    if not pieces:
        return
    with tally.watch("lm"):
        requests = synthesizer.requests(pieces, settings)
        cells = requests.prompt.shape[1] + requests.max_new_tokens + decoding.draft_length + 1
        slots = Slots(synthesizer, decoding, 1, cells, len(requests.stop_ids))
        waiting = [row_request(synthesizer, requests, i, _key(settings, i)) for i in range(len(pieces))]
        slots.admit(waiting.pop(0))
        slots.advance(1)
    while slots.unread:
        with tally.watch("lm"):
            slots.advance(1)
            changed = list(slots.read())
            for row in changed:
                check_finite(row.stop_reason)
                if not row.running and waiting:
                    slots.admit(waiting.pop(0))
                    slots.advance(1)
        yield from changed
        if not waiting and slots.rows == [None]:
            return


def _key(settings: Settings, number: int) -> Array:
    """The key of a piece by its number among all pieces, [1]."""
    return row_keys(settings.key(), np.array([number], np.uint32))
