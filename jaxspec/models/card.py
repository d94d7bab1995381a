"""What a language model's checkpoint says of itself beyond its weights: ids, prompt, sampling, limits, codec, licence.

A family's settings file (llasa.py, cosyvoice.py, ...) makes a ``Model`` when a checkpoint is converted; it is stored whole in the
checkpoint's JSON, and what speaks reads nothing else.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.models.transformer import Config, RopeScaling
from jaxspec.sampling import Sampling

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """A converted language model.

    shape: of the transformer. Ids are those of its input tables, see ``jaxspec.types``.
    codes_first, num_codes, slots: code c of slot s of a frame is id codes_first + s * num_codes + c.
    stop_ids: end a text.
    text_first: the id of the tokenizer's id 0; 0 where the head has the tokenizer's whole vocabulary.
    prompt: its parts. A string is tokenized on its own, after {text}, {voice} and {reference} were filled in; a number is an id.
        Without {reference}, the reference's text comes before the text, and a space between them.
    clones: whether codes of a reference may follow the prompt.
    voices: names for {voice}, the first being the default.
    phonemes: the language, as espeak names it, in whose phonemes the text is given; "": the text itself.
    max_tokens: of prompt and codes together; max_new_tokens: of codes; max_codes_per_token: of codes for each token of the text.
        0 is no such limit. min_codes_per_token: before that many, ``sampling.withheld`` does not come.
    codec: "xcodec2", "neucodec", "snac", or "" where codes are all that comes out.
    head: "all" (the checkpoint's whole vocabulary), or "speech" (codes and stop ids alone, their law renormalised).
    source, files: what was converted. digest: of all parameters; tables: of each table and head, to know what models share.
    """

    family: str
    shape: Config
    codes_first: int
    num_codes: int
    stop_ids: tuple[int, ...]
    text_first: int
    prompt: tuple[str | int, ...]
    sampling: Sampling
    codec: str
    licence: str
    slots: int = 1
    clones: bool = True
    voices: tuple[str, ...] = ()
    phonemes: str = ""
    max_tokens: int = 0
    max_new_tokens: int = 0
    max_codes_per_token: int = 0
    min_codes_per_token: int = 0
    head: str = "all"
    source: str = ""
    files: tuple[str, ...] = ()
    digest: str = ""
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


def to_json(model: Model) -> dict[str, Any]:
    """A model as plain values."""
    return {"kind": "language model", **dataclasses.asdict(model)}


def from_json(values: Mapping[str, Any], path: Path) -> Model:
    """The model that ``to_json`` wrote.

    Raises:
        ValueError: the values are not those of a model, as ``path`` said they were.
    """
    try:
        values = dict(values)
        if values.pop("kind") != "language model":
            raise ValueError("it is of a codec")
        shape = dict(values.pop("shape"))
        scaling = shape.pop("rope_scaling")
        shape = Config(**_tuples(shape), rope_scaling=RopeScaling(**scaling) if scaling else None)
        model = Model(shape=shape, sampling=Sampling(**values.pop("sampling")), **_tuples(values))
        for field, kind in typing.get_type_hints(Model).items():
            plain = typing.get_origin(kind) or kind
            if not isinstance(getattr(model, field), (dict if plain is Mapping else plain)):
                raise ValueError(f"{field} is {getattr(model, field)!r}")
        return model
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the description of a language model in {path}, but {error}: convert it again") from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def code_ids(tokenizer: Any, pattern: str) -> tuple[int, int]:
    """The id of the token that ``pattern`` ("<|s_{}|>") gives for 0, and how many follow it, their ids without a gap.

    Raises:
        ValueError: there are none.
    """
    (first,) = token_ids(tokenizer, pattern.format(0))
    count = 1
    while tokenizer.token_to_id(pattern.format(count)) == first + count:
        count += 1
    return first, count


def token_ids(tokenizer: Any, *tokens: str) -> list[int]:
    """The ids of some tokens.

    Raises:
        ValueError: the tokenizer lacks one.
    """
    ids = [tokenizer.token_to_id(token) for token in tokens]
    if None in ids:
        raise ValueError(f"expected a tokenizer that knows {tokens[ids.index(None)]}, but it does not: give the checkpoint's")
    return ids


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: it is missing or damaged.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"expected a tokenizer at {folder / TOKENIZER}, but {error}: convert the checkpoint again") from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """The tokenizer's ids of a text, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(
    model: Model, tokenizer: Any, text: str, voice: str = "", reference: str = "", codes: Sequence[int] | np.ndarray = ()
) -> np.ndarray:
    """The ids of a prompt, int32 [P].

    Args:
        model: whose prompt.
        tokenizer: the checkpoint's.
        text: what to say, in phonemes where the model takes them.
        voice: one of ``model.voices``, "" for the first.
        reference: what the reference says.
        codes: of the reference, int [T] or, with slots, [T Q].

    Raises:
        ValueError: a voice that the model does not know, or a reference that it cannot take.
    """
    if voice and voice not in model.voices:
        raise ValueError(f"expected a voice among {', '.join(model.voices) or 'none'}, got {voice!r}")
    codes = np.asarray(codes, np.int64)
    if len(codes) and not model.clones:
        raise ValueError(f"expected no reference codes for {model.family}, which takes none: choose a voice in their place")
    if codes.ndim != 1 or (len(codes) and not 0 <= codes.min() <= codes.max() < model.num_codes):
        span = f"{codes.min()} to {codes.max()}" if codes.size else "none"
        raise ValueError(f"expected reference codes int [T] of 0 to {model.num_codes - 1}, got {codes.shape} of {span}")
    apart = any("{reference}" in str(part) for part in model.prompt)
    if reference and not apart:
        text = f"{reference} {text}"
    ids: list[int] = []
    for part in model.prompt:
        if isinstance(part, int):
            ids.append(part)
            continue
        for name, value in (("{voice}", voice or next(iter(model.voices), "")), ("{reference}", reference), ("{text}", text)):
            part = part.replace(name, value)
        ids += [model.text_first + i for i in tokenize(tokenizer, part)]
    return np.array([*ids, *(model.codes_first + codes)], np.int32)


def codes_of(model: Model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes among emitted ids [T], and where they stood: (int32 [T' Q], int32 [T' Q] indices into ``ids``).

    What is no code is left out: stop ids, text, and whole frames in which a code is not of its slot.
    """
    at = np.flatnonzero((ids >= model.codes_first) & (ids < model.codes_first + model.slots * model.num_codes))
    at = at[: len(at) // model.slots * model.slots].reshape(-1, model.slots)
    codes = ids[at] - model.codes_first - model.num_codes * np.arange(model.slots)
    whole = ((codes >= 0) & (codes < model.num_codes)).all(1)
    return codes[whole].astype(np.int32), at[whole].astype(np.int32)
