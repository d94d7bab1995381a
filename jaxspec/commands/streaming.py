"""`say --stream`: speech to standard output, or to a file, while it is still being decoded."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxspec.audio.pcm import pcm16, wav_header
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.pipeline import Tally
from jaxspec.synthesis.stream import stream

STANDARD_OUTPUT = "-"


class Timing:
    """When the chunks of a stream came, compilation excluded."""

    def __init__(self) -> None:
        self.waits: list[float] = []  # seconds that each chunk took to come
        self.durations: list[float] = []  # seconds of sound in each

    def figures(self) -> dict[str, Any]:
        """Time to first audio, the gaps between chunks, and how often a player that starts with the first chunk waits."""
        first, *gaps = self.waits or [0.0]
        p50, p95 = (round(float(np.percentile(gaps, p)), 4) if gaps else None for p in (50, 95))
        count = underruns(self.waits[1:], self.durations)
        return {"time_to_first_audio_s": round(first, 4), "gap_p50_s": p50, "gap_p95_s": p95, "underruns": count}


def underruns(gaps: Sequence[float], durations: Sequence[float]) -> int:
    """How often a player that starts with the first chunk has nothing to play.

    >>> underruns([0.5, 2.0, 0.1], [1.0, 1.0, 1.0, 1.0])
    1

    Args:
        gaps: seconds between each chunk and the one before it.
        durations: seconds of sound in each chunk, one more than gaps.
    """
    left, count = 0.0, 0
    for gap, duration in zip(gaps, durations, strict=False):
        left += duration - gap
        if left < 0:
            left, count = 0.0, count + 1
    return count


def say_stream(text: str, settings: Settings, synthesizer: Synthesizer, out: Path | None, raw: bool) -> tuple[Tally, Timing]:
    """Speaks a text chunk by chunk; a player that is closed ends it.

    Args:
        text: what to say.
        settings: how to synthesize.
        synthesizer: the model and its codec.
        out: a file that ends in .wav; None is standard output.
        raw: the samples alone, without a header.
    """
    tally, timing, rate = Tally(), Timing(), synthesizer.sample_rate_hz
    chunks = stream(text, settings, synthesizer, tally=tally)  # refuses what it cannot speak before anything is written
    with _opened(out) as file:
        if not raw:
            file.write(wav_header(rate))
        num_bytes = 0  # of samples
        began, compiling = time.perf_counter(), tally.watch.seconds["compile"]
        for chunk in chunks:
            now, compiled = time.perf_counter(), tally.watch.seconds["compile"]
            timing.waits.append(max(now - began - (compiled - compiling), 0.0))
            timing.durations.append(len(chunk.wave) / rate)
            num_bytes += file.write(pcm16(chunk.wave))
            file.flush()
            began, compiling = time.perf_counter(), compiled
        if out is not None and not raw:
            file.seek(0)
            file.write(wav_header(rate, num_bytes))
    return tally, timing


@contextlib.contextmanager
def _opened(out: Path | None) -> Iterator[BinaryIO]:
    if out is not None:
        with out.open("wb") as file:
            yield file
        return
    try:
        yield sys.stdout.buffer
    except BrokenPipeError:  # nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter can flush at its end
