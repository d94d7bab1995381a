"""The recogniser's process: reads 16-bit 16 kHz waves from standard input and prints one line of text for each.

Each wave follows its length in bytes (uint32, little-endian). ``python -P listen.py RECOGNIZER`` imports that recogniser only.
"""

import struct
import sys
import tempfile
import wave
from collections.abc import Callable
from typing import BinaryIO

SAMPLE_RATE_HZ = 16_000


def pocketsphinx() -> Callable[[bytes], str]:
    """The recogniser of the CMU: samples to words; '' where none is recognised."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=SAMPLE_RATE_HZ, loglevel="FATAL", fwdflat=False)

    def transcribe(samples: bytes) -> str:
        decoder.start_utt()
        decoder.process_raw(samples, full_utt=True)
        decoder.end_utt()
        best = decoder.hyp()
        return best.hypstr if best else ""

    return transcribe


def moonshine() -> Callable[[bytes], str]:
    """Moonshine base-en, which comes with its package: samples to text."""
    from moonshine_cpp import MoonshineModel

    model = MoonshineModel()

    def transcribe(samples: bytes) -> str:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:  # its own `transcribe`, of samples, fails in version 0.1.4
            with wave.open(file, "wb") as writer:
                writer.setparams((1, 2, SAMPLE_RATE_HZ, len(samples) // 2, "NONE", ""))
                writer.writeframes(samples)
            file.flush()
            return str(model.transcribe_wav(file.name))

    return transcribe


def listen(source: BinaryIO, transcribe: Callable[[bytes], str]) -> None:
    """Prints the transcript of each wave in a line until the source ends.

    Args:
        source: (length in bytes, samples) pairs, one for each wave.
        transcribe: samples to text.
    """
    while header := source.read(4):
        (size,) = struct.unpack("<I", header)
        print(" ".join(transcribe(source.read(size)).split()), flush=True)


if __name__ == "__main__":
    listen(sys.stdin.buffer, {"pocketsphinx": pocketsphinx, "moonshine": moonshine}[sys.argv[1]]())
