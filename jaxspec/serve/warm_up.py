"""What the engine compiles before it serves: every size of a call, every width of a prompt, every length of a window."""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from jaxspec.codec.padding import padded_length
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.serve.lane import Lane, Shapes
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.pipeline import row_keys
from jaxspec.synthesis.slots import Row, row_request
from jaxspec.synthesis.windows import MOST_CODES

TEXT = "one, two, three."
CODEC_ROWS = 4  # windows that are decoded together, at most
_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
_TIMED = 4  # calls
Step = Callable[[], object]


def shapes(synthesizer: Synthesizer, slots: int, max_prompt: int | None, max_codes: int | None) -> Shapes:
    """The sizes for a number of slots: by default those that the longest piece of a text needs."""
    piece = max(synthesizer.pieces("one two three four five " * 50), key=len)
    requests = synthesizer.requests([piece], Settings(voice=synthesizer.default_voice))
    most = max_prompt or requests.prompt.shape[1]
    widths = (*(width for width in _WIDTHS if width < most), most)
    return Shapes(slots, widths, min(max_codes or 2**31, requests.max_new_tokens), len(requests.stop_ids))


def loop_steps(
    lanes: Mapping[str, Lane], sizes: Shapes, synthesizer: Synthesizer, rounds: int, autotuner: Autotuner[str]
) -> Iterator[Step]:
    """The steps that compile admission and rounds, and tell the autotuner what the rounds of each rule and size take."""
    for rule, lane in lanes.items():
        told = functools.partial(_tell, autotuner, rule)
        yield from (functools.partial(_admit, lane, width, synthesizer, 0) for width in sizes.prompt_widths)
        yield from (functools.partial(_rounds, lane, size, rounds, synthesizer, sizes, told) for size in lane.slots.sizes)


def codec_rows(synthesizer: Synthesizer) -> int:
    """How many windows are decoded together: one where a window has all the codes of a piece, or all so far."""
    return 1 if None in synthesizer.context_frames else CODEC_ROWS


def codec(sizes: Shapes, synthesizer: Synthesizer, code: np.ndarray) -> None:
    """Compiles the codec for windows of every length and voices of every size; ``code`` is one, int32 [1] or [1 Q]."""
    assert synthesizer.decode_windows is not None
    left, right = synthesizer.context_frames
    voices: Collection[str | None] = (synthesizer.default_voice,)
    if synthesizer.sizes:
        voices = {synthesizer.sizes(voice): voice for voice in synthesizer.voices}.values()  # recordings differ in length
    most = sizes.max_codes // code.size if left is None or right is None else left + -(-MOST_CODES // code.size) + right
    for batch in (2**power for power in range(codec_rows(synthesizer).bit_length())):
        for length in sorted({padded_length(length) for length in range(1, most + 1)}):
            rows = [np.repeat(code, length, axis=0)] * batch
            for voice in voices:
                synthesizer.decode_windows(rows, Settings(voice=voice), Stopwatch())


def _tell(autotuner: Autotuner[str], rule: str, size: int, num_tokens: int, seconds: float) -> None:
    if rule in autotuner.candidates:
        autotuner.record(size, rule, num_tokens, seconds)


def _admit(lane: Lane, width: int, synthesizer: Synthesizer, limit: int) -> Row:
    """A row of at most ``limit`` tokens."""
    settings = Settings(voice=synthesizer.default_voice, seed=2**32)  # one that takes two parts of a key
    requests = synthesizer.requests(synthesizer.pieces(TEXT)[:1], settings)
    requests = requests._replace(limit=np.minimum(requests.limit, limit))
    keys = row_keys(settings.key(), np.zeros(1, np.uint32))
    row = lane.slots.admit(row_request(synthesizer, requests, 0, keys, width))
    if limit == 0:
        lane.slots.release(row)
    return row


def _rounds(lane: Lane, size: int, rounds: int, synthesizer: Synthesizer, sizes: Shapes, told: Callable[..., None]) -> None:
    """Fills ``size`` slots, runs them once to compile, and then a few times more for their rate."""
    rows = [_admit(lane, sizes.prompt_widths[-1], synthesizer, sizes.max_codes) for _ in range(size)]
    for timed in range(1 + _TIMED):
        began = time.perf_counter()
        lane.slots.advance(rounds, size)
        num_tokens = sum(row.num_new for row in lane.slots.read())
        if timed and num_tokens:
            told(size, num_tokens, time.perf_counter() - began)
    for row in rows:
        lane.slots.release(row)
