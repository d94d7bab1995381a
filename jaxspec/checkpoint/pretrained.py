"""Saves and loads language models, drafts and codecs, a folder each."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
from blake3 import blake3

from jaxspec.acoustic import cosyvoice, flow
from jaxspec.checkpoint import descriptions, store, tensors
from jaxspec.checkpoint.descriptions import CodecDescription, DraftDescription, Tuned
from jaxspec.checkpoint.tensors import Tensor
from jaxspec.codec import snac, xcodec2
from jaxspec.common import records
from jaxspec.common.trees import flatten
from jaxspec.draft import families, model_draft
from jaxspec.draft.families import FAMILIES
from jaxspec.models import card, transformer
from jaxspec.models import placement as placements
from jaxspec.models.card import Model
from jaxspec.models.placement import Placement
from jaxspec.types import Codec, Draft, LanguageModel, Params

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CODECS = {"xcodec2": xcodec2, "neucodec": xcodec2, "snac": snac, "cosyvoice2": cosyvoice, "cosyvoice3": cosyvoice}

_Description = TypeVar("_Description", bound=Model | DraftDescription | CodecDescription)


class Pretrained(NamedTuple):
    """A language model on the device, with its tokenizer."""

    model: Model
    params: Params
    tokenizer: "Tokenizer"
    folder: Path


class PretrainedDraft(NamedTuple):
    """A draft on the device.

    Attributes:
        drafter: K -> the draft that proposes K tokens; the same K gives the same object, so that nothing recompiles.
        params: of the draft; some may be the target's own arrays.
        folder: where it was loaded from.
        feature_layers: the hidden states of the target that it reads, see ``with_features``.
        max_length: the largest K; None: any.
        tuned: how it is used best; None before `jaxspec tune`.
    """

    drafter: Callable[[int], Draft]
    params: Params
    folder: Path
    feature_layers: tuple[int, ...] = ()
    max_length: int | None = None
    tuned: Tuned | None = None


class PretrainedCodec(NamedTuple):
    """A codec on the device."""

    family: str
    codec: Codec
    params: Params
    digest: str = ""  # of all parameters
    folder: Path = Path()


def save(
    folder: str | Path,
    description: _Description,
    params: Params | Mapping[str, Tensor],
    tokenizer: "Tokenizer | None" = None,
    inside: Callable[[Path], None] | None = None,
) -> _Description:
    """Writes a folder that ``load``, ``load_draft`` or ``load_codec`` reads. The folder appears only when it is complete.

    Args:
        folder: does not exist yet.
        description: of a language model, a draft or a codec; the fields digest, tables and parameters are filled in here.
        params: a nested dict of arrays of any dtype, or ``Tensor``s by path ("layer_0/mlp/up/kernel"), which are read a few rows
            at a time. Those that a draft shares with its target are left out.
        tokenizer: required for a language model, None otherwise.
        inside: called with the folder before it appears, to put more into it.

    Returns:
        The description as written.

    Raises:
        ValueError: the folder exists, the parameters are not finite or do not have the shapes that a language model's description
            gives, the tokenizer is missing, or a draft names no target.
        OSError: the folder cannot be written.
    """
    flat = {
        path: value if isinstance(value, Tensor) else tensors.of_array(path, value) for path, value in flatten(params).items()
    }
    if isinstance(description, DraftDescription):
        flat = {path: tensor for path, tensor in flat.items() if path not in description.shared}
    _check(description, flat, tokenizer)
    with store.creating(folder) as partial:
        digests = store.write_params(partial, flat)
        written = dataclasses.replace(
            description,
            digest=f"blake3:{blake3(json.dumps(digests, sort_keys=True).encode()).hexdigest()}",
            parameters=sum(math.prod(tensor.shape) for tensor in flat.values()),
        )
        if isinstance(written, Model):
            tables = {path: digest for path, digest in digests.items() if path.startswith(("table_", "head"))}
            written = dataclasses.replace(written, tables=tables)
        if tokenizer is not None:
            tokenizer.save(str(partial / card.TOKENIZER))
        store.write_description(partial, descriptions.to_json(written))
        if inside is not None:
            inside(partial)
    return written


def _check(description: Model | DraftDescription | CodecDescription, flat: Mapping[str, Tensor], tokenizer: object) -> None:
    """Raises ValueError where a folder would be written that cannot be loaded."""
    if isinstance(description, Model) != (tokenizer is not None):
        raise ValueError("expected a tokenizer with a language model and with nothing else: pass tokenizer only with a Model")
    if isinstance(description, DraftDescription):
        if description.family not in FAMILIES:
            raise ValueError(f"expected a draft of {', '.join(FAMILIES)}, got {description.family!r}: choose one of these")
        if not description.target:
            raise ValueError("expected the digest of the draft's target, got none: pass target=pretrained.model.digest")
    if isinstance(description, Model):
        abstract = flatten(transformer.abstract_params(description.shape))
        for path in sorted(abstract.keys() | flat.keys()):
            wanted, got = (tuple(some[path].shape) if path in some else None for some in (abstract, flat))
            if wanted != got:
                raise ValueError(f"expected shape {wanted} of {path}, got {got}: pass the parameters of description.shape")


def load(folder: str | Path, dtype: str | None = None, placement: Placement | None = None) -> Pretrained:
    """Loads a language model; each array goes straight to its devices, and a process reads the parts of those it has.

    Args:
        folder: that ``jaxspec convert`` or ``save`` made; it may be a gs:// address.
        dtype: to compute in, "bfloat16" or "float32"; by default that of the checkpoint.
        placement: the devices; by default the mesh that ``jax.set_mesh`` has set, else the first device.

    Returns:
        The model, with its parameters on the devices.

    Raises:
        ValueError: the folder is not a language model or is damaged, or the placement does not divide the model.
    """
    folder = store.located(folder)
    model, tokenizer = descriptions.read_as(folder, Model), card.tokenizer_of(folder)
    return _load(folder, model, tokenizer, dtype or model.shape.dtype, placement, {})


def _load(
    folder: Path,
    model: Model,
    tokenizer: "Tokenizer",
    dtype: str,
    placement: Placement | None,
    shared: Mapping[str, jax.Array],
    strict: bool = True,
) -> Pretrained:
    """Reads the parameters that are not among ``shared``."""
    placement = placement or placements.current()
    shardings = transformer.shardings_of(model.shape, placement, strict) if placement else None
    params = store.read_params(folder, dtype, shardings, shared)
    return Pretrained(dataclasses.replace(model, shape=dataclasses.replace(model.shape, dtype=dtype)), params, tokenizer, folder)


def load_draft(folder: str | Path, target: Pretrained, placement: Placement | None = None) -> PretrainedDraft:
    """Loads a draft for a target: one that was trained for it, or any language model of the same vocabulary.

    The draft computes in the target's dtype. Arrays that it shares with the target are the target's own, without another copy.

    Args:
        folder: a draft, or a language model, that ``jaxspec convert`` or ``save`` made.
        target: the loaded target.
        placement: the devices, as for the target; see ``families.shardings``.

    Returns:
        The draft, for every K.

    Raises:
        ValueError: the folder is neither, is damaged, belongs to another target, or has another vocabulary.
    """
    folder, dtype = store.located(folder), target.model.shape.dtype
    description = descriptions.read(folder)
    if isinstance(description, Model):
        tokenizer = card.tokenizer_of(folder)
        _check_vocabulary(target, description, tokenizer, folder)
        equal = {path: path for path, digest in description.tables.items() if target.model.tables.get(path) == digest}
        model = _load(folder, description, tokenizer, dtype, placement, _arrays_of(target, equal, folder), strict=False)
        return PretrainedDraft(functools.cache(functools.partial(model_draft, language_model(model))), model.params, folder)
    if not isinstance(description, DraftDescription):
        raise ValueError(f"expected a draft in {folder}, got a codec: give the folder of a draft or of a smaller language model")
    if description.target != target.model.digest:
        raise ValueError(
            f"expected the target {description.target} for the draft {folder}, got {target.model.digest} in {target.folder}: "
            "give the target that the draft was trained for"
        )
    drafter = build_draft(description, None, dtype, folder)  # a wrong description is refused before the arrays are read
    placement = placement or placements.current()
    config = families.from_json(description.family, description.settings, dtype)
    of = functools.partial(families.shardings, description.family, config, placement) if placement else None
    return drafter._replace(params=store.read_params(folder, dtype, of, _arrays_of(target, description.shared, folder)))


def build_draft(description: DraftDescription, params: Params, dtype: str, source: Path) -> PretrainedDraft:
    """The draft of a description.

    Args:
        description: of the draft.
        params: all its parameters, see ``draft.family.with_shared``.
        dtype: the target's, to compute in.
        source: where it comes from.

    Raises:
        ValueError: the description is not that of a draft of this version.
    """
    try:
        config = families.from_json(description.family, description.settings, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a draft of {', '.join(FAMILIES)} in {source}, got {description.family!r} with {error}: save it again"
        ) from error
    family = FAMILIES[description.family]
    drafter, layers, longest = family.drafter(config), family.feature_layers(config), family.max_length(config)
    return PretrainedDraft(functools.cache(drafter), params, source, layers, longest, descriptions.tuned_of(description, source))


def _arrays_of(target: Pretrained, shared: Mapping[str, str], folder: Path) -> dict[str, jax.Array]:
    """The target's arrays under the names that a draft gives them."""
    theirs = flatten(target.params)
    if missing := sorted(set(shared.values()) - theirs.keys()):
        raise ValueError(f"expected a target with {', '.join(missing)} for {folder}, got {target.folder}: save the draft again")
    return {path: theirs[name] for path, name in shared.items()}


def _check_vocabulary(target: Pretrained, draft: Model, tokenizer: "Tokenizer", folder: Path) -> None:
    """Raises ValueError, naming the first difference, where an id means one thing to the target and another to the draft."""

    def check(what: str, wanted: object, got: object) -> None:
        if wanted != got:
            raise ValueError(
                f"expected a draft with the vocabulary of {target.folder}, whose {what} is {wanted!r}, got {folder}, "
                f"whose {what} is {got!r}: draft with a model of the same family"
            )

    for name in ("codes_first", "num_codes", "slots", "stop_ids", "text_first", "head"):
        check(name, getattr(target.model, name), getattr(draft, name))
    check("number of ids", target.model.shape.vocab, draft.shape.vocab)
    for i in range(max(target.tokenizer.get_vocab_size(), tokenizer.get_vocab_size())):
        check(f"token {i}", target.tokenizer.id_to_token(i), tokenizer.id_to_token(i))


def language_model(pretrained: Pretrained) -> LanguageModel:
    """The pure functions of a loaded language model; the same shape gives the same object."""
    return transformer.language_model(pretrained.model.shape)


def with_features(target: Pretrained, feature_layers: tuple[int, ...]) -> Pretrained:
    """The target with the features that a draft reads."""
    shape = dataclasses.replace(target.model.shape, feature_layers=feature_layers)
    return target._replace(model=dataclasses.replace(target.model, shape=shape))


def load_codec(folder: str | Path, encoder: bool = True) -> PretrainedCodec:
    """Loads a codec; every device of a mesh that ``jax.set_mesh`` has set has all of it, and decodes a part of each batch.

    Args:
        folder: that ``jaxspec convert`` or ``save`` made.
        encoder: whether to load the encoder, where the folder has one.

    Returns:
        The codec, with its parameters on the device.

    Raises:
        ValueError: the folder is not a codec, is damaged, or has the flow of an earlier version.
    """
    description = descriptions.read_as(folder, CodecDescription)
    try:
        module = CODECS[description.family]
        config = records.from_json(module.Config, description.shape)
        codec = module.codec(config)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"expected a codec of {', '.join(CODECS)} in {folder}, got {description.family!r} with {error}: convert it again"
        ) from error
    codec = codec if encoder else codec._replace(encode=None)
    placement = placements.current()
    everywhere = placement.sharding() if placement else None
    params = store.read_params(folder, sharding=everywhere, without=None if encoder else "encoder")
    if module is cosyvoice and (missing := flatten(flow.abstract_params(config.flow)).keys() - flatten(params["flow"]).keys()):
        raise ValueError(f"expected flow/{min(missing)} in {folder}, got the flow of an earlier version: convert it again")
    return PretrainedCodec(description.family, codec, params, description.digest, Path(folder))


def memory_bytes(*params: Params) -> int:
    """The bytes that some parameters occupy on the device; shared arrays count once."""
    arrays = {id(array): array for array in jax.tree.leaves(params)}
    return sum(array.nbytes for array in arrays.values())
