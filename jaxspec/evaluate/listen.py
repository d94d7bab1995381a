"""A process that hears: 16-bit 16 kHz waves on its standard input, each after its length, a line of text for each on its output.

It is run as a file of its own, ``python -P listen.py``, so that it loads the recogniser and nothing of JAX.
"""

import struct
import sys
from typing import BinaryIO

SETTINGS = {"samprate": 16_000, "loglevel": "FATAL", "fwdflat": False}


def listen(source: BinaryIO) -> None:
    """Prints what is said in each wave until the source ends; an empty line where nothing is."""
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
