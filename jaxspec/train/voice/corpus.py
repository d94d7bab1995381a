"""Recordings to learn from: flite speaks the sentences of the recipe, and tells which phone it speaks when.

A corpus is a folder of shards. Each shard is one ``.npz``: ``signal`` (all utterances, one after the other: int16
samples, or uint16 codes), ``start`` int64 [N + 1] (their borders) and ``meta`` (JSON: text, voice, phones with
end times in seconds).
"""

import itertools
import json
import os
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.train.voice.sentences import sentences

SAMPLE_RATE_HZ = 16_000


class Recording(NamedTuple):
    """One recording: text, voice name, [(phone, end_s), ...] and the wave int16 [N], or its codes uint16 [T] once encoded."""

    text: str
    voice: str
    phones: list[tuple[str, float]]
    signal: np.ndarray


def record(text: str, voice: str) -> Recording:
    """Lets flite speak one text.

    Raises:
        RuntimeError: when flite is not installed or fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"expected a working flite (Debian package 'flite'): {error}") from error
        with wave.open(file.name) as reader:
            samples = np.frombuffer(reader.readframes(reader.getnframes()), np.int16)
    pairs = [item.rsplit(":", 1) for item in done.stdout.split()]
    return Recording(text, voice, [(phone, float(end)) for phone, end in pairs], samples)


def write_shard(path: Path, utterances: list[Recording]) -> None:
    """Writes one shard; the file appears whole or not at all."""
    start = np.cumsum([0] + [len(u.signal) for u in utterances])
    meta = json.dumps([{"text": u.text, "voice": u.voice, "phones": u.phones} for u in utterances])
    with replacing(path) as partial:
        np.savez(partial, signal=np.concatenate([u.signal for u in utterances]), start=start, meta=np.array(meta))


def read_shard(path: Path) -> list[Recording]:
    """Reads one shard back."""
    with np.load(path, allow_pickle=False) as data:
        samples, start, meta = data["signal"], data["start"], json.loads(str(data["meta"]))
    borders = itertools.pairwise(start)
    return [Recording(m["text"], m["voice"], m["phones"], samples[a:b]) for m, (a, b) in zip(meta, borders, strict=True)]


def build(directory: Path, voices: list[str], hours: float, seed: int, shard_size: int = 512) -> Iterator[float]:
    """Records shards until ``hours`` of speech lie in ``directory``; yields the hours so far. Shards that exist are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    total_s = 0.0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index in itertools.count():
            path = directory / f"{index:05d}.npz"
            if not path.exists():
                texts = itertools.islice(sentences(seed * 100_000 + index), shard_size)
                write_shard(path, list(pool.map(record, texts, itertools.cycle(voices))))
            with np.load(path, allow_pickle=False) as data:
                total_s += data["start"][-1] / SAMPLE_RATE_HZ
            yield total_s / 3600
            if total_s >= hours * 3600:
                return
