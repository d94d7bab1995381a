"""The recogniser's process: reads 16-bit 16 kHz waves from standard input and prints one line of text for each.

Each wave follows its length in bytes (uint32, little-endian). Run as ``python -P listen.py``, it imports pocketsphinx only.
"""

import struct
import sys
from typing import BinaryIO

SETTINGS = {"samprate": 16_000, "loglevel": "FATAL", "fwdflat": False}


def listen(source: BinaryIO) -> None:
    """Prints the transcript of each wave until the source ends; an empty line where no word is recognised.

    Args:
        source: (length in bytes, samples) pairs, one for each wave.
    """
    from pocketsphinx import Decoder

    decoder = Decoder(**SETTINGS)
    while header := source.read(4):
        (size,) = struct.unpack("<I", header)
        decoder.start_utt()
        decoder.process_raw(source.read(size), full_utt=True)
        decoder.end_utt()
        best = decoder.hyp()
        print(best.hypstr if best else "", flush=True)


if __name__ == "__main__":
    listen(sys.stdin.buffer)
