"""The built-in voice: its ids, its prompt, and the file that holds target, draft and codec.

prompt: voice | text symbols ... | speak          then codes ... | stop
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from blake3 import blake3

from jaxspec.codec import builtin as codecs
from jaxspec.codec import fsq
from jaxspec.common import records, weights
from jaxspec.common.trees import flatten
from jaxspec.models import int8, transformer
from jaxspec.text.symbols import SYMBOLS, encode, to_symbols
from jaxspec.types import Params

VOICES = ("slt", "rms")
LEVELS = (7, 5, 5, 5, 5)
CODES = fsq.codebook_size(LEVELS)
STOP = CODES
VOCAB = CODES + 1  # the head's vocabulary
PROMPT_ROWS = len(SYMBOLS) + len(VOICES) + 1
SPEAK = VOCAB + PROMPT_ROWS - 1
MAX_SYMBOLS = 112  # the longest text of the training data
MAX_CODES = 240
_SHAPES: dict[str, Any] = {"target": transformer.Config, "codec": codecs.Config}
BUILTIN = Path(str(resources.files("jaxspec"))) / "voice" / "builtin.safetensors"


class Voice(NamedTuple):
    """The configs and weights of target and codec, which codes occur in the training data (bool [V]), and perhaps a draft.

    The draft is the JSON of a ``checkpoint.descriptions.DraftDescription``, and the parameters that it does not share.
    """

    target: transformer.Config
    codec: codecs.Config
    target_params: Params
    codec_params: Params
    trained: np.ndarray
    draft: Mapping[str, Any] | None = None
    draft_params: Params = None

    def code_vectors(self, matrix: str) -> np.ndarray:
        """The embeddings from which groups are built, float32 [V D]: the "target"'s input rows, or the "codec"'s coordinates."""
        if matrix == "target":
            return np.asarray(int8.rows(self.target_params, "table_0"))
        vectors = np.asarray(fsq.vectors(jnp.arange(CODES, dtype=jnp.int32), LEVELS))
        return np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])


def voice_index(name: str) -> int:
    """The index of a voice in ``VOICES``.

    Raises:
        ValueError: the model has no such voice.
    """
    if name not in VOICES:
        raise ValueError(f"expected a voice among {', '.join(VOICES)}, got {name!r}: choose one of these")
    return VOICES.index(name)


def prompt(symbols: list[str], voice: str) -> np.ndarray:
    """The prompt's ids, int32 [len(symbols) + 2]."""
    speaker = VOCAB + len(SYMBOLS) + voice_index(voice)
    return np.concatenate([[speaker], VOCAB + encode(symbols), [SPEAK]]).astype(np.int32)


def prompts(sentences: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts of normalised sentences and their voices, int32 [B MAX_SYMBOLS+2], and their lengths, int32 [B]."""
    ids = [prompt(to_symbols(sentence), name) for sentence, name in zip(sentences, names, strict=True)]
    padded = np.stack([np.pad(row, (0, MAX_SYMBOLS + 2 - len(row))) for row in ids])
    return padded, np.array([len(row) for row in ids], np.int32)


def save(path: str | os.PathLike, voice: Voice) -> None:
    """Writes a voice, weights as float16."""
    tree = {"target": voice.target_params, "codec": voice.codec_params, "trained": voice.trained}
    described: dict[str, Any] = {name: dataclasses.asdict(getattr(voice, name)) for name in ("target", "codec")}
    if voice.draft is not None:
        tree, described = tree | {"draft": voice.draft_params}, described | {"draft": dict(voice.draft)}
    weights.save(path, tree, described)


def load(path: str | os.PathLike = BUILTIN) -> Voice:
    """Reads a voice.

    Raises:
        ValueError: the file is missing, damaged, or not a voice.
    """
    tree, described = weights.load(path)
    draft = described.get("draft")
    if draft is not None and "family" not in draft:  # the first voices had a smaller model as their draft
        settings = {"target": described["target"], "layers": [], "shape": draft}
        draft = {"family": "model", "settings": settings, "target": "", "shared": {}}
    try:
        target, codec = (records.from_json(kind, described[name]) for name, kind in _SHAPES.items())
        return Voice(target, codec, tree["target"], tree["codec"], tree["trained"], draft, tree.get("draft"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a voice of jaxspec in {path}, but it is not one ({error}): install it again") from error


def quantized(voice: Voice) -> Voice:
    """The voice with int8 weights in its target, and in the tables that its draft shares; see ``models.int8``."""
    params, draft = int8.quantize(voice.target_params), voice.draft
    if draft is not None:
        flat, shared = flatten(params), draft["shared"]
        scales = {ours + int8.SUFFIX: theirs + int8.SUFFIX for ours, theirs in shared.items() if theirs + int8.SUFFIX in flat}
        settings = {**draft["settings"], "target": {**draft["settings"]["target"], "weights": "int8"}}
        draft = {**draft, "settings": settings, "shared": {**shared, **scales}}
    return voice._replace(target=dataclasses.replace(voice.target, weights="int8"), target_params=params, draft=draft)


def digest(voice: Voice) -> str:
    """The digest of a voice's target, by which drafts that are trained for it name it."""
    hasher = blake3()
    for name, array in sorted(flatten(voice.target_params).items()):
        hasher.update(name.encode()).update(array.astype(np.float16).tobytes())
    return f"blake3:{hasher.hexdigest()}"
