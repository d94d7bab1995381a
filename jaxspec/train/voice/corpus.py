"""The corpus: recordings of the recipe's sentences by flite, with the phones and their times.

A corpus is a folder of shards. Each shard is one ``.npz``: ``signal`` (the N recordings concatenated: int16 samples, or uint16
codes), ``start`` int64 [N + 1] (where each begins and ends) and ``meta`` (JSON: text, voice, phones with end times in seconds).
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import tempfile
import wave
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.train.voice.prose import prose
from jaxspec.train.voice.sentences import sentences

SAMPLE_RATE_HZ = 16_000


class Recording(NamedTuple):
    """One recording."""

    text: str
    voice: str
    phones: list[tuple[str, float]]  # (phone, end in seconds); empty where the phones are unknown
    signal: np.ndarray  # the wave, int16 [N], or its codes, uint16 [T]


def record(text: str, voice: str) -> Recording:
    """Records one text with flite.

    Args:
        text: plain English.
        voice: a voice of flite.

    Returns:
        the recording, at ``SAMPLE_RATE_HZ``.

    Raises:
        RuntimeError: flite is not installed or fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"expected a working flite, got {error}: apt-get install flite") from error
        with wave.open(file.name) as reader:
            samples = np.frombuffer(reader.readframes(reader.getnframes()), np.int16)
    pairs = [item.rsplit(":", 1) for item in done.stdout.split()]
    return Recording(text, voice, [(phone, float(end)) for phone, end in pairs], samples)


def write_shard(path: Path, recordings: Sequence[Recording]) -> None:
    """Writes one or more recordings as a shard, atomically."""
    start = np.cumsum([0] + [len(one.signal) for one in recordings])
    meta = json.dumps([{"text": one.text, "voice": one.voice, "phones": one.phones} for one in recordings])
    with replacing(path) as partial:
        np.savez(partial, signal=np.concatenate([one.signal for one in recordings]), start=start, meta=np.array(meta))


def read_shard(path: Path) -> list[Recording]:
    """Reads the recordings of a shard.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as data:
            signal, start, meta = data["signal"], data["start"], json.loads(str(data["meta"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a shard of recordings, got {path}: {error}; remove it and run its stage again") from error
    return [
        Recording(one["text"], one["voice"], [(phone, end) for phone, end in one["phones"]], signal[first:last])
        for one, (first, last) in zip(meta, itertools.pairwise(start), strict=True)
    ]


def texts(seed: int, prose_share: float, max_symbols: int) -> Iterator[str]:
    """Texts to record, without end: pieces of prose among plain sentences; the same for the same seed.

    Args:
        seed: of the random choices.
        prose_share: the fraction of pieces of prose.
        max_symbols: the largest number of symbols in a piece of prose.

    Raises:
        FileNotFoundError: the word list is not installed.
    """
    rng, plain, running = random.Random(seed), sentences(seed), prose(seed, max_symbols)
    while True:
        yield next(running if rng.random() < prose_share else plain)


def build(
    directory: Path,
    voices: Sequence[str],
    hours: float,
    seed: int,
    prose_share: float,
    max_symbols: int,
    shard_size: int = 512,
) -> Iterator[float]:
    """Records shards until the folder holds ``hours`` of speech. Shards that exist are kept.

    Args:
        directory: the corpus; created if it does not exist.
        voices: the voices of flite; sentences take them in turn.
        hours: of speech.
        seed, prose_share, max_symbols: of ``texts``.
        shard_size: recordings in a shard.

    Yields:
        the hours so far, after each shard.

    Raises:
        RuntimeError: flite is not installed or fails; the former is said before any work.
        FileNotFoundError: the word list is not installed; said before any work.
    """
    if shutil.which("flite") is None:
        raise RuntimeError("expected flite to be installed, got no such program: apt-get install flite")
    next(texts(seed, prose_share, max_symbols))  # the word list
    directory.mkdir(parents=True, exist_ok=True)
    total_s = 0.0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index in itertools.count():
            path = directory / f"{index:05d}.npz"
            if not path.exists():
                chosen = itertools.islice(texts(seed * 100_000 + index, prose_share, max_symbols), shard_size)
                write_shard(path, list(pool.map(record, chosen, itertools.cycle(voices))))
            with np.load(path, allow_pickle=False) as data:
                total_s += data["start"][-1] / SAMPLE_RATE_HZ
            yield total_s / 3600
            if total_s >= hours * 3600:
                return
