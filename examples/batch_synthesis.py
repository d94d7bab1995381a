"""Synthesize many texts in batches, from Python, into a folder: python batch_synthesis.py [FOLDER]."""

import sys
from pathlib import Path

import soundfile

import jaxspec
from jaxspec.synthesis.contract import Settings

TEXTS = ["The rain has stopped.", "We can go for a walk.", "Take the blue umbrella, just in case."]


def main(folder: Path = Path("out")) -> None:
    """Speaks every text with the built-in voice, and writes a file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    result = jaxspec.speak(TEXTS, Settings(voice="slt", verify="coarse-grained", seed=7))
    for number, utterance in enumerate(result.utterances, 1):
        path = folder / f"{number:03d}.wav"
        soundfile.write(path, utterance.wave, utterance.sample_rate_hz)
        print(f"{path.name}: {len(utterance.wave) / utterance.sample_rate_hz:.2f} s, {len(utterance.codes)} codes")
    counts = result.counts
    print(f"{counts['tokens_per_round']:.2f} tokens per round, {counts['acceptance_rate']:.0%} of the drafted codes accepted")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
