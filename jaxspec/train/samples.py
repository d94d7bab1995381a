"""Samples of speech tokens with their prompts and texts: shards on disk, checked against a target, split into two parts.

    FOLDER/samples.json   FOLDER/00000.npz   FOLDER/00001.npz ...

A shard holds ``tokens`` int32 [sum of the lengths], ``start`` int64 [rows + 1], ``prompt_length`` int32 [rows] and ``texts``, a
JSON list of strings. A folder made elsewhere has no samples.json, and its shards may leave ``prompt_length`` out: then ``tokens``
are codes only, and the target's own prompts of the texts are put before them.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.common.files import replacing, write_json
from jaxspec.models.card import Model

DESCRIPTION = "samples.json"
_HELD_OUT, _LEAST_HELD_OUT = 0.05, 8


class Samples(NamedTuple):
    """Rows of prompt and emitted tokens, end to end.

    Attributes:
        tokens: int32 [N]; row i is tokens[start[i] : start[i + 1]].
        start: int64 [rows + 1].
        prompt_length: int32 [rows]; None where the rows are codes without prompts.
        texts: what each row says.
        features: the target's hidden states at the tokens, float16 [N F], see ``train.features``; None where they are not kept.
    """

    tokens: np.ndarray
    start: np.ndarray
    prompt_length: np.ndarray | None
    texts: list[str]
    features: np.ndarray | None = None

    def row(self, i: int) -> np.ndarray:
        """The tokens of a row, int32 [T]."""
        return self.tokens[self.start[i] : self.start[i + 1]]


def of_rows(rows: Sequence[np.ndarray], prompt_length: Sequence[int] | np.ndarray | None, texts: Sequence[str]) -> Samples:
    """Samples from rows of tokens.

    >>> of_rows([np.array([7, 1]), np.array([8, 2, 3])], [1, 1], ["a", "b"]).start.tolist()
    [0, 2, 5]
    """
    start = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
    return Samples(tokens, start, None if prompt_length is None else np.asarray(prompt_length, np.int32), list(texts))


def concatenate(parts: Sequence[Samples]) -> Samples:
    """All rows of some samples; all with prompts or all without."""
    rows = [part.row(i) for part in parts for i in range(len(part.texts))]
    lengths = [part.prompt_length for part in parts if part.prompt_length is not None]
    return of_rows(rows, np.concatenate(lengths) if lengths else None, [text for part in parts for text in part.texts])


def shard_path(folder: Path, index: int) -> Path:
    """The file of shard ``index``."""
    return folder / f"{index:05d}.npz"


def write_shard(path: Path, samples: Samples) -> None:
    """Writes a shard atomically.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[str, Any] = {"tokens": samples.tokens, "start": samples.start, "texts": np.array(json.dumps(samples.texts))}
    if samples.prompt_length is not None:
        arrays["prompt_length"] = samples.prompt_length
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_shard(path: Path) -> Samples:
    """Reads a shard.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            lengths = np.asarray(file["prompt_length"], np.int32) if "prompt_length" in file.files else None
            tokens, start = (_integers(file[name]) for name in ("tokens", "start"))
            read = Samples(tokens.astype(np.int32), start.astype(np.int64), lengths, json.loads(str(file["texts"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a shard with tokens, start and texts, got {path}: {error}; make it again") from error
    _check_shard(path, read)
    return read


def _integers(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{array.dtype} {array.shape} in place of a row of integers")
    return array


def _check_shard(path: Path, shard: Samples) -> None:
    lengths, rows = np.diff(shard.start), len(shard.texts)
    prompts = np.zeros(rows) if shard.prompt_length is None else shard.prompt_length
    if len(lengths) != rows or len(prompts) != rows or shard.start[0] != 0 or shard.start[-1] != len(shard.tokens):
        raise ValueError(
            f"expected start [rows + 1] from 0 to the number of tokens and as many texts, got {len(lengths)} rows, {rows} texts "
            f"and {len(shard.tokens)} tokens in {path}: write it again"
        )
    if (lengths <= prompts).any() or (prompts < 0).any():
        raise ValueError(f"expected a token after each prompt, got a row without one in {path}: leave it out")


def read(folder: Path) -> Samples:
    """All shards of a folder.

    Raises:
        ValueError: there is none, or one is damaged.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ValueError(f"expected a folder with .npz shards of samples, got {folder}: make one with jaxspec sample")
    parts = [read_shard(path) for path in paths]
    if len({part.prompt_length is None for part in parts}) > 1:
        raise ValueError(f"expected shards all with prompt_length or all without, got both in {folder}: keep them apart")
    return concatenate(parts)


def check(samples: Samples, model: Model, folder: Path) -> None:
    """Refuses samples with ids that a target does not have.

    Raises:
        ValueError: a token is negative or beyond the vocabulary.
    """
    without = samples.prompt_length is None
    prompts = np.zeros(len(samples.texts), np.int64) if samples.prompt_length is None else samples.prompt_length
    emitted = np.arange(len(samples.tokens)) >= np.repeat(samples.start[:-1] + prompts, np.diff(samples.start))
    codes = model.num_codes if without else model.shape.vocab - model.shape.padding
    for tokens, bound, what in (
        (samples.tokens[emitted], codes, "codes" if without else "emitted tokens"),
        (samples.tokens[~emitted], sum(model.shape.input_tables), "prompt tokens"),
    ):
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < bound:
            raise ValueError(
                f"expected {what} from 0 to {bound - 1} for {model.family}, got {tokens.min()} to {tokens.max()} in {folder}: "
                "use data of this target's codec"
            )


def split(samples: Samples) -> tuple[Samples, Samples]:
    """The rows to train on, and those held out: the last 5 %, at least 8.

    Raises:
        ValueError: there are fewer than 16 rows.
    """
    rows = len(samples.texts)
    if rows < 2 * _LEAST_HELD_OUT:
        raise ValueError(f"expected at least {2 * _LEAST_HELD_OUT} samples, got {rows}: give more texts")
    first = rows - max(_LEAST_HELD_OUT, round(_HELD_OUT * rows))
    return _rows(samples, 0, first), _rows(samples, first, rows)


def _rows(samples: Samples, first: int, end: int) -> Samples:
    start = samples.start[first : end + 1]
    tokens = slice(start[0], start[-1])
    return Samples(
        samples.tokens[tokens],
        start - start[0],
        None if samples.prompt_length is None else samples.prompt_length[first:end],
        samples.texts[first:end],
        None if samples.features is None else samples.features[tokens],
    )


def read_description(folder: Path) -> dict[str, Any] | None:
    """What ``samples.json`` says of a folder; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a description of samples, got {path}: {error}; sample into a new folder") from error
    return read


def claim(folder: str | os.PathLike[str], description: dict[str, Any]) -> None:
    """Writes ``samples.json``, or checks that the one in the folder says the same.

    Raises:
        ValueError: the folder holds samples of another target, of other texts, or sampled otherwise.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (before := read_description(folder)) is None:
        if any(folder.glob("*.npz")):
            raise ValueError(f"expected a new folder or one of jaxspec sample, got other shards in {folder}: choose another")
        write_json(folder / DESCRIPTION, description)
        return
    for name in {**before, **description}:
        if before.get(name) != description.get(name):
            raise ValueError(
                f"expected samples with the {name} {before.get(name)} of {folder}, got {description.get(name)}: "
                "use the arguments that they were begun with, or another folder"
            )
