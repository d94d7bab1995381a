"""Loads what ``jaxspec convert`` made: language models that share what is equal, drafts that fit them, and codecs."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from jaxspec.checkpoint import store
from jaxspec.codec import snac, xcodec2
from jaxspec.models import card, transformer
from jaxspec.models.card import Model
from jaxspec.types import Codec, Params

CODECS = {"xcodec2": xcodec2, "neucodec": xcodec2, "snac": snac}


class Pretrained(NamedTuple):
    """A language model ready to run."""

    model: Model
    params: Params
    tokenizer: Any
    folder: Path


class PretrainedCodec(NamedTuple):
    """A decoder of codes ready to run."""

    family: str
    codec: Codec
    params: Params


def load(folder: str | Path, dtype: str | None = None, sharding: Any = None, beside: Pretrained | None = None) -> Pretrained:
    """Loads a converted language model.

    Args:
        folder: that ``jaxspec convert`` made.
        dtype: to compute in, "bfloat16" or "float32"; by default that of the checkpoint.
        sharding: where each parameter goes, see ``jaxspec.checkpoint.store.read_params``.
        beside: a model whose tables and head are used where they are equal, in place of another copy.

    Raises:
        ValueError: the folder is not a converted language model, is damaged, or does not speak the same vocabulary as ``beside``.
    """
    folder = Path(folder)
    model = card.from_json(store.read_description(folder), folder / store.DESCRIPTION)
    tokenizer = card.tokenizer_of(folder)
    shared = {}
    if beside is not None:
        check_pair(beside, model, tokenizer, folder)
        dtype = dtype or beside.model.shape.dtype
        theirs = traverse_util.flatten_dict(beside.params, sep="/")
        equal = [name for name, digest in model.tables.items() if beside.model.tables.get(name) == digest]
        shared = {name: theirs[name] for name in equal}
    params = store.read_params(folder, dtype, sharding, shared)
    if dtype is not None:
        model = _with_dtype(model, dtype)
    return Pretrained(model, params, tokenizer, folder)


def _with_dtype(model: Model, dtype: str) -> Model:
    return dataclasses.replace(model, shape=dataclasses.replace(model.shape, dtype=dtype))


def check_pair(target: Pretrained, draft: Model, tokenizer: Any, folder: Path) -> None:
    """Raises ValueError, which names the first difference, where a draft's ids do not mean what the target's mean."""
    ours = target.model
    for name in ("codes_first", "num_codes", "slots", "stop_ids", "text_first", "head"):
        one, other = getattr(ours, name), getattr(draft, name)
        if one != other:
            raise ValueError(_differ(target, folder, f"{name} is {one} in the one and {other} in the other"))
    if ours.shape.vocab != draft.shape.vocab:
        raise ValueError(_differ(target, folder, f"the heads have {ours.shape.vocab} and {draft.shape.vocab} rows"))
    size = max(target.tokenizer.get_vocab_size(), tokenizer.get_vocab_size())
    for i in range(size):
        one, other = target.tokenizer.id_to_token(i), tokenizer.id_to_token(i)
        if one != other:
            raise ValueError(_differ(target, folder, f"token {i} is {one!r} in the one and {other!r} in the other"))


def _differ(target: Pretrained, folder: Path, how: str) -> str:
    return f"expected a draft with the vocabulary of {target.folder}, came {folder}: {how}; draft with a model of the same family"


def language_model(pretrained: Pretrained) -> Any:
    """The pure functions of a loaded model."""
    return transformer.language_model(pretrained.model.shape)


def load_codec(folder: str | Path) -> PretrainedCodec:
    """Loads a converted codec.

    Raises:
        ValueError: the folder is not a converted codec, or is damaged.
    """
    folder = Path(folder)
    description = store.read_description(folder)
    try:
        if description["kind"] != "codec":
            raise ValueError("it is of a language model")
        module = CODECS[description["family"]]
        shape = {name: tuple(value) if isinstance(value, list) else value for name, value in description["shape"].items()}
        codec = module.codec(module.Config(**shape))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"expected the description of a codec in {folder}, but {error}: convert it again") from error
    return PretrainedCodec(description["family"], codec, store.read_params(folder))


def memory_bytes(*params: Params) -> int:
    """What parameters take, those that are shared counted once."""
    arrays = {id(array): array for array in jax.tree.leaves(params)}
    return sum(array.nbytes for array in arrays.values())
