"""What the engine compiles before it serves: every size of a call, every width of a prompt, every length of a window."""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxspec.codec.padding import padded_length
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.serve.lane import Lane, Shapes
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.pipeline import row_keys
from jaxspec.synthesis.slots import row_request
from jaxspec.synthesis.windows import MOST_CODES

TEXT = "one, two."
CODEC_ROWS = 4  # windows that are decoded together, at most
_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
Step = Callable[[], None]


def shapes(synthesizer: Synthesizer, slots: int, max_prompt: int | None, max_codes: int | None) -> Shapes:
    """The sizes for a number of slots: by default those that the longest piece of a text needs."""
    piece = max(synthesizer.pieces("one two three four five " * 50), key=len)
    requests = synthesizer.requests([piece], Settings())
    most = max_prompt or requests.prompt.shape[1]
    widths = (*(width for width in _WIDTHS if width < most), most)
    return Shapes(slots, widths, min(max_codes or 2**31, requests.max_new_tokens), len(requests.stop_ids))


def loop_steps(lanes: Iterable[Lane], sizes: Shapes, synthesizer: Synthesizer, rounds: int) -> Iterator[Step]:
    """The steps that compile admission and rounds."""
    for lane in lanes:
        yield from (functools.partial(_prompt, lane, width, synthesizer) for width in sizes.prompt_widths)
        yield from (functools.partial(_rounds, lane, size, rounds) for size in lane.slots.sizes)


def codec_rows(synthesizer: Synthesizer) -> int:
    """How many windows are decoded together: whole pieces are decoded one by one."""
    return 1 if None in synthesizer.context_frames else CODEC_ROWS


def codec(sizes: Shapes, synthesizer: Synthesizer, code: np.ndarray) -> None:
    """Compiles the codec for windows of every length; ``code`` is one, int32 [1] or [1 Q]."""
    assert synthesizer.decode is not None
    left, right = synthesizer.context_frames
    most = sizes.max_codes // code.size if left is None or right is None else left + -(-MOST_CODES // code.size) + right
    for batch in (2**power for power in range(codec_rows(synthesizer).bit_length())):
        for length in sorted({padded_length(length) for length in range(1, most + 1)}):
            synthesizer.decode([np.repeat(code, length, axis=0)] * batch, Settings(), Stopwatch())


def _prompt(lane: Lane, width: int, synthesizer: Synthesizer) -> None:
    settings = Settings(seed=2**32)  # one that takes two parts of a key
    requests = synthesizer.requests(synthesizer.pieces(TEXT)[:1], settings)
    requests = requests._replace(limit=np.zeros_like(requests.limit))
    keys = row_keys(settings.key(), np.zeros(1, np.uint32))
    lane.slots.release(lane.slots.admit(row_request(synthesizer, requests, 0, keys, width)))


def _rounds(lane: Lane, size: int, rounds: int) -> None:
    lane.slots.advance(rounds, size)
    list(lane.slots.read())
