"""The description of a language model beyond its weights: ids, prompt, sampling, limits, codec and licence.

A family's settings file (llasa.py, cosyvoice.py, ...) builds a ``Model`` when a checkpoint is converted. It is stored in the
folder's JSON, and synthesis reads nothing else about the family.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model of speech codes.

    Attributes:
        family: "llasa", "orpheus", ...
        shape: of the transformer. Ids are those of its input tables, see ``jaxspec.types``.
        codes_first, num_codes, slots: code c of slot s of a frame has the id codes_first + s * num_codes + c.
        stop_ids: ids that end an utterance.
        text_first: the id of the tokenizer's id 0; 0 where the head has the tokenizer's whole vocabulary.
        prompt: its parts, in order. A string is tokenized separately, after {text}, {voice} and {reference} are filled in; a
            number is an id. Without {reference}, the reference's text precedes the text, separated by a space.
        sampling: the default.
        codec: "xcodec2", "neucodec", "snac", or "" for a family whose codec is not implemented (codes only).
        licence: of the weights.
        instruct: replaces the part of the prompt with {reference} where an instruction is given, "{instruct}"; "": it takes none.
        clone: the prompt with a reference, whose codes are the part "{codes}"; (): they follow the prompt.
        clones: whether it takes codes of a reference recording.
        voices: names for {voice}; the first is the default.
        phonemes: the espeak language in whose phonemes the text is given; "" for plain text.
        max_tokens: limit on prompt and codes together. max_new_tokens: limit on codes. max_codes_per_token: limit on codes per
            token of the text. 0 is no limit.
        min_codes_per_token: ``sampling.withheld`` is not sampled before that many codes per token of the text.
        head: "all" (the checkpoint's vocabulary) or "speech" (codes and stop ids only, with their probs renormalised).
        source, files: what was converted.
        digest: of all parameters. tables: the digest of each input table and head, by which models find equal arrays.
        parameters: how many numbers there are; 0 if unknown.
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
    instruct: str = ""
    clone: tuple[str | int, ...] = ()
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
    parameters: int = 0


def code_ids(tokenizer: "Tokenizer", pattern: str) -> tuple[int, int]:
    """The ids of the codes in a tokenizer.

    Args:
        tokenizer: of the checkpoint.
        pattern: the token of code number {}, such as "<|s_{}|>".

    Returns:
        The id of code 0, and how many codes follow it with consecutive ids.

    Raises:
        ValueError: the tokenizer has none.
    """
    (first,) = token_ids(tokenizer, pattern.format(0))
    count = 1
    while tokenizer.token_to_id(pattern.format(count)) == first + count:
        count += 1
    return first, count


def token_ids(tokenizer: "Tokenizer", *tokens: str) -> list[int]:
    """The ids of some tokens.

    Raises:
        ValueError: the tokenizer does not have one of them.
    """
    ids = []
    for token in tokens:
        if (found := tokenizer.token_to_id(token)) is None:
            raise ValueError(f"expected a tokenizer with the token {token}, got one without it: use the checkpoint's own")
        ids.append(found)
    return ids


def tokenizer_of(folder: Path) -> "Tokenizer":
    """The tokenizer of a folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"expected a tokenizer at {folder / TOKENIZER}, got {error}: convert the checkpoint again") from error


def tokenize(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The tokenizer's ids of a text, without special tokens around them."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(
    model: Model,
    tokenizer: "Tokenizer",
    text: str,
    voice: str = "",
    reference: str = "",
    codes: Sequence[int] | np.ndarray = (),
    instruct: str = "",
) -> np.ndarray:
    """The ids of a prompt.

    Args:
        model: the language model's description.
        tokenizer: of the checkpoint.
        text: the text to speak, in phonemes where ``model.phonemes`` is set.
        voice: one of ``model.voices``; "" is the first.
        reference: the text of the reference recording.
        codes: of the reference recording, int [T], or [T Q] where a frame has several.
        instruct: how to speak, in place of the reference's text.

    Returns:
        int32 [P].

    Raises:
        ValueError: the model does not have the voice, takes no such reference or no instruction, or an id lies outside its input
            tables.
    """
    _check_voice(model, voice)
    codes = _checked_codes(model, codes)
    if instruct and not model.instruct:
        raise ValueError(f"expected no instruction for {model.family}, which takes none, got {instruct!r}: leave it out")
    prompt = model.clone if model.clone and len(codes) else (*model.prompt, "{codes}")
    if reference and not any("{reference}" in str(part) for part in prompt):
        text = f"{reference} {text}"
    given = {"voice": voice or next(iter(model.voices), ""), "instruct": instruct, "reference": reference, "text": text}
    ids: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
        elif part == "{codes}":
            ids += (model.codes_first + codes).tolist()
        else:
            part = model.instruct if instruct and "{reference}" in part else part
            for name, value in given.items():
                part = part.replace(f"{{{name}}}", value)
            ids += [model.text_first + i for i in tokenize(tokenizer, part)]
    rows = sum(model.shape.input_tables)
    if ids and max(ids) >= rows:
        raise ValueError(
            f"expected prompt ids below {rows}, the rows of the input tables of {model.family}, got {max(ids)}: "
            "use the tokenizer that belongs to the checkpoint"
        )
    return np.array(ids, np.int32)


def _check_voice(model: Model, voice: str) -> None:
    if voice and not model.voices:
        instead = "give a reference recording" if model.clones else "leave the voice out"
        raise ValueError(f"expected no voice for {model.family}, which has no named voices, got {voice!r}: {instead} instead")
    if voice and voice not in model.voices:
        raise ValueError(f"expected a voice among {', '.join(model.voices)}, got {voice!r}: choose one of these")


def _checked_codes(model: Model, codes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Codes of frames [T] or [T Q] as a row of codes counted over all slots, int64 [T*Q]."""
    codes = np.asarray(codes, np.int64)
    if len(codes) and not model.clones:
        instead = "choose a voice instead" if model.voices else "leave them out"
        raise ValueError(f"expected no reference codes for {model.family}, which takes none, got {len(codes)}: {instead}")
    frame = () if model.slots == 1 else (model.slots,)
    if len(codes) and (codes.shape[1:] != frame or not 0 <= codes.min() <= codes.max() < model.num_codes):
        shape = " ".join(["T", *map(str, frame)])
        raise ValueError(
            f"expected reference codes int [{shape}] of 0 to {model.num_codes - 1}, got {codes.shape} of {codes.min()} to "
            f"{codes.max()}: encode the recording with the codec of {model.family}"
        )
    return (codes.reshape(-1, model.slots) + model.num_codes * np.arange(model.slots)).reshape(-1)


def codes_of(model: Model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes among emitted ids.

    Stop ids and text are left out, and so is a whole frame in which an id does not belong to its slot.

    Args:
        model: the language model's description.
        ids: emitted ids, int [T].

    Returns:
        The codes int32 [T' Q], and their indices into ``ids``, int32 [T' Q].
    """
    at = np.flatnonzero((ids >= model.codes_first) & (ids < model.codes_first + model.slots * model.num_codes))
    at = at[: len(at) // model.slots * model.slots].reshape(-1, model.slots)
    codes = ids[at] - model.codes_first - model.num_codes * np.arange(model.slots)
    whole = ((codes >= 0) & (codes < model.num_codes)).all(1)
    return codes[whole].astype(np.int32), at[whole].astype(np.int32)
