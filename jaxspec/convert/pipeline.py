"""Converts a PyTorch checkpoint to a folder of jaxspec: open -> recognise -> lay out -> plan -> save.

A family is one settings file in ``jaxspec.models`` or ``jaxspec.codec`` and one table of rules in ``jaxspec.convert``; this file
lists them all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jaxspec import mesh
from jaxspec.checkpoint import pretrained, store, voices
from jaxspec.checkpoint.descriptions import CodecDescription
from jaxspec.checkpoint.tensors import Tensor, cast, joined, padded, rows
from jaxspec.codec import snac as snac_codec
from jaxspec.codec import xcodec2 as xcodec2_codec
from jaxspec.common.trees import flatten
from jaxspec.convert import acoustic, cosyvoice, llama, snac, xcodec2
from jaxspec.convert.core import Rule, fold_weight_norm, plan
from jaxspec.convert.source import Source, open_source
from jaxspec.models import card, llasa, neutts, orpheus, transformer
from jaxspec.models import cosyvoice as cosyvoice_model
from jaxspec.models import placement as placements

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Vocabulary(Protocol):
    """A settings module of ``jaxspec.models`` whose checkpoints have text and codes in one vocabulary.

    Attributes:
        NAME: of the family.
        MARK: the token by which the family is recognised.
        STOPS: the tokens that end an utterance.
        SLOTS: codes per frame.
    """

    NAME: str
    MARK: str
    STOPS: tuple[str, ...]
    SLOTS: int

    def codes(self, tokenizer: "Tokenizer") -> tuple[int, int]:
        """The id of the first code and the number of codes of a slot; ValueError where the tokenizer has none."""
        ...

    def model(self, shape: transformer.Config, tokenizer: "Tokenizer", ids: dict[str, Any]) -> card.Model:
        """The description of a checkpoint.

        Args:
            shape: of the transformer.
            tokenizer: of the checkpoint.
            ids: the fields of ``card.Model`` that depend on the head: codes_first, num_codes, stop_ids, text_first and head.

        Raises:
            ValueError: the tokenizer does not have a token of the prompt.
        """
        ...


VOCABULARIES: dict[str, Vocabulary] = {llasa.NAME: llasa, neutts.NAME: neutts, orpheus.NAME: orpheus}
CODECS = {
    "xcodec2": (xcodec2, xcodec2_codec, "CC-BY-NC-4.0"),
    "neucodec": (xcodec2, xcodec2_codec, "Apache-2.0"),
    "snac": (snac, snac_codec, "MIT"),
}
FAMILIES = (*VOCABULARIES, *cosyvoice_model.VERSIONS, *CODECS)
DRAFTERS = {  # published drafters, see ``convert.drafters``, and a tensor by which each is recognised
    "llasa-plus": "mtp_1_proj.weight",
    "speechspec": "hidden_norm.weight",
    "angelslim-eagle3": "midlayer.hidden_norm.weight",
}
MAX_PAD = 2**16
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a conversion.

    Attributes:
        family: one of ``FAMILIES``; by default recognised from the files.
        dtype: of the parameters: "bfloat16", "float16" or "float32"; by default that of the files, but float32 for
            float16 and for codecs.
        layers: those to keep, for a draft; by default all.
        head: "all", or "speech": codes and stop ids only, for models with text and codes in one vocabulary.
        pad_to: rows of the head and the tables are padded to a multiple of it, so that a mesh divides them.
        encoder: whether to convert the codec's encoder too; without it a codec only decodes.
        weights: "int8": the matrices of a language model in int8, see ``transformer.Config.weights``.
        mesh: "data=D,model=M" that must divide a language model.

    Raises:
        ValueError: a setting is out of range.
    """

    family: str | None = None
    dtype: str | None = None
    layers: tuple[int, ...] | None = None
    head: str = "all"
    pad_to: int = 1
    encoder: bool = True
    weights: str = "float"
    mesh: str | None = None

    def __post_init__(self) -> None:
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"expected a family among {', '.join(FAMILIES)}, got {self.family!r}: choose one of these")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype among {', '.join(DTYPES)}, got {self.dtype!r}: choose one of these")
        if self.head not in ("all", "speech") or not 1 <= self.pad_to <= MAX_PAD:
            got = f"{self.head!r} and {self.pad_to}"
            raise ValueError(f"expected head all or speech and pad_to of 1 to {MAX_PAD}, got {got}: change --head or --pad-to")
        if self.mesh is not None:
            mesh.parse(self.mesh)
        if self.weights not in transformer.WEIGHTS:
            known = ", ".join(transformer.WEIGHTS)
            raise ValueError(f"expected weights among {known}, got {self.weights!r}: choose one of these")
        if self.layers is not None and not self.layers:
            raise ValueError("expected one layer or more to keep, got none: change --layers")


class Layout(NamedTuple):
    """A checkpoint ready to be saved: parameters, description, names of the tensors left out, and notes for the user."""

    params: dict[str, Tensor]
    description: card.Model | CodecDescription
    dropped: list[str]
    notes: list[str]
    tokenizer: "Tokenizer | None" = None


class Converted(NamedTuple):
    """What a conversion wrote: its family and size, the names of the tensors left out, and notes for the user."""

    family: str
    parameters: int
    bytes: int
    dropped: list[str]
    notes: list[str]


def convert(source: str, dest: str | Path, options: Options | None = None, revision: str | None = None) -> Converted:
    """Converts a checkpoint into the new folder ``dest``, which is written atomically.

    Args:
        source: a directory, a weight file, or an id of the Hugging Face hub.
        dest: a folder that does not exist yet.
        options: see ``Options``.
        revision: of the hub repository.

    Returns:
        What was written.

    Raises:
        ValueError: there is no checkpoint, its family is unknown, it is damaged (one line per problem), or ``dest`` exists.
        OSError: ``dest`` cannot be written, or the disk is full.
    """
    options = options or Options()
    store.check_new(dest)  # before a download
    opened = open_source(source, revision)
    tokenizer = _tokenizer(opened)
    name = options.family or recognise(opened.tensors, tokenizer)
    layout = _layout(name, opened, tokenizer, options)
    files = tuple(path.name for path in opened.files)
    description = dataclasses.replace(layout.description, source=opened.origin, files=files)
    whole = name in cosyvoice_model.VERSIONS and not options.layers and (opened.folder / acoustic.FLOW).is_file()
    sound = acoustic.layout(opened.folder, cosyvoice_model.VERSIONS[name], options.encoder) if whole else None
    inside = functools.partial(_write_sound, opened, sound, layout.notes) if sound else None
    written = pretrained.save(dest, description, layout.params, layout.tokenizer, inside)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in layout.params.values())
    return Converted(name, written.parameters, total, layout.dropped, layout.notes)


def _write_sound(opened: Source, sound: acoustic.Sound, notes: list[str], folder: Path) -> None:
    """Writes the codec of CosyVoice and its named voices into the folder of its language model."""
    written = pretrained.save(folder / "codec", dataclasses.replace(sound.description, source=opened.origin), sound.params)
    found = acoustic.voices(opened.folder, written.digest)
    for name, voice in found.items():
        voices.save(voices.path_of(folder, name), voice)
    named = f" and {len(found)} named voices" if found else ""
    notes.append(f"with its codec of {written.parameters / 1e6:,.1f} M parameters{named}")


def drafter_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The family of a published drafter, one of ``DRAFTERS``, by the names of its tensors; None for anything else."""
    return next((name for name, mark in DRAFTERS.items() if mark in tensors), None)


def recognise(tensors: dict[str, Tensor], tokenizer: "Tokenizer | None") -> str:
    """The family of a checkpoint, by the names of its tensors and its tokens.

    Args:
        tensors: by name.
        tokenizer: of the checkpoint, None if there is none.

    Returns:
        One of ``FAMILIES``.

    Raises:
        ValueError: the family is unknown, or a drafter's.
    """
    if drafter := drafter_of(tensors):
        raise ValueError(f"expected the target of the drafter {drafter}, got none: give its folder by --target")
    if "generator.head.out.weight" in tensors or "acoustic_decoder.head.linear.weight" in tensors:
        head = tensors.get("generator.head.out.weight") or tensors["acoustic_decoder.head.linear.weight"]
        return "neucodec" if head.shape[0] == 1922 else "xcodec2"
    if "quantizer.quantizers.0.codebook.weight" in tensors:
        return "snac"
    if version := cosyvoice.version_of(tensors, tokenizer):
        return version.name
    for name, module in VOCABULARIES.items():
        if tokenizer is not None and tokenizer.token_to_id(module.MARK) is not None:
            return name
    some = ", ".join(sorted(tensors)[:3])
    got = "the tokenizer of another family" if tokenizer is not None else "no tokenizer.json"
    raise ValueError(
        f"expected a checkpoint of {', '.join(FAMILIES)}, got tensors {some} ... and {got}: give --family if it is one of these"
    )


def _tokenizer(opened: Source) -> "Tokenizer | None":
    if (opened.folder / card.TOKENIZER).exists():
        return card.tokenizer_of(opened.folder)
    if version := cosyvoice.version_of(opened.tensors, None):
        return cosyvoice.tokenizer(opened.folder, version)
    return None


def _layout(name: str, opened: Source, tokenizer: "Tokenizer | None", options: Options) -> Layout:
    if name in CODECS:
        return _codec(name, opened, options)
    if not options.encoder and name in VOCABULARIES:
        raise ValueError(f"expected --without-encoder for a codec, got it for {name}, which has none: leave it out")
    if tokenizer is None:
        raise ValueError(f"expected {card.TOKENIZER} beside the weights of {name}, got none: download it too")
    if name in VOCABULARIES:
        return _one_vocabulary(VOCABULARIES[name], opened, tokenizer, options)
    return _cosyvoice(cosyvoice_model.VERSIONS[name], opened, tokenizer, options)


def _codec(name: str, opened: Source, options: Options) -> Layout:
    if options.layers or options.head != "all" or options.pad_to != 1:
        raise ValueError(f"expected no --layers, --head or --pad-to for the codec {name}, got one: leave it out")
    if options.weights != "float":
        raise ValueError(
            f"expected --weights {options.weights} for a language model, got it for the codec {name}, which has no table for it: "
            "leave it out"
        )
    table, codec, licence = CODECS[name]
    tensors = fold_weight_norm(opened.tensors)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    config, rules = table.config(shapes, opened.config, options.encoder)
    description = CodecDescription(name, dataclasses.asdict(config), licence)
    dtype = DTYPES[options.dtype or "float32"]
    return _planned(tensors, rules, codec.abstract_params(config), dtype, description, [], [])


def _one_vocabulary(module: Vocabulary, opened: Source, tokenizer: "Tokenizer", options: Options) -> Layout:
    """LLaSA, NeuTTS-Air, Orpheus: text and codes in one vocabulary, of which the head may keep codes and stop ids only."""
    tensors, settings, dropped, notes = dict(opened.tensors), llama.checked(opened.config), [], []
    if options.layers:
        tensors, settings, dropped = llama.cut_layers(tensors, settings, options.layers)
    embed, head = llama.tie(tensors, settings, notes)
    bias, vocab = tensors.pop("lm_head.bias", None), settings.get("vocab_size", embed.shape[0])
    first, count = module.codes(tokenizer)
    codes, stops = module.SLOTS * count, card.token_ids(tokenizer, *module.STOPS)
    if (last := max(first + codes - 1, *stops)) >= embed.shape[0]:
        raise ValueError(
            f"expected a row of {embed.name} for each id up to {last}, got {embed.shape[0]}: use the checkpoint's own tokenizer"
        )
    if options.head == "speech":
        parts = [(first, first + codes), *((stop, stop + 1) for stop in stops)]
        tables, table_rows = [_some(embed, parts), embed], [codes + len(stops), vocab]
        head, bias = (tensor and _some(tensor, parts) for tensor in (head, bias))
        first, stops = 0, range(codes, codes + len(stops))
    else:
        tables, table_rows = [embed], [vocab]
    tensors |= {f"table_{i}": table for i, table in enumerate(tables)}
    tensors |= {name: tensor for name, tensor in (("head", head), ("head_bias", bias)) if tensor is not None}

    def make(shape: transformer.Config) -> card.Model:
        text_first = shape.vocab if options.head == "speech" else 0
        ids = {"codes_first": first, "num_codes": count, "stop_ids": tuple(stops), "text_first": text_first, "head": options.head}
        return module.model(shape, tokenizer, ids)

    return _language_model(tensors, settings, table_rows, make, options, dropped, notes, tokenizer)


def _some(tensor: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    return joined([rows(tensor, *part) for part in parts])


def _cosyvoice(version: cosyvoice_model.Version, opened: Source, tokenizer: "Tokenizer", options: Options) -> Layout:
    notes: list[str] = []
    separate = "llm_decoder.weight" in opened.tensors
    if separate:
        tensors, dropped = cosyvoice.separate(dict(opened.tensors), version)
    else:
        tensors, dropped = cosyvoice.unmerge(dict(opened.tensors), notes, version, tokenizer)
    settings = llama.checked(cosyvoice.backbone(opened.folder) if separate else opened.config)
    if options.layers:
        tensors, settings, more = llama.cut_layers(tensors, settings, options.layers)
        dropped += more
    last = f"table_{2 if version.markers else 1}"
    text_rows = tensors[last].shape[0] if last in tensors else 0
    if separate and 0 < text_rows < (tokens := tokenizer.get_vocab_size()):
        raise ValueError(
            f"expected a row of {tensors[last].name} for each of {tokens} tokens, got {text_rows}: use the checkpoint's own"
        )
    table_rows = [version.rows, *([version.markers] if version.markers else []), text_rows]
    make = functools.partial(cosyvoice_model.model, version)
    return _language_model(tensors, settings, table_rows, make, options, dropped, notes, tokenizer)


def _language_model(
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    table_rows: Sequence[int],
    make: Callable[[transformer.Config], card.Model],
    options: Options,
    dropped: list[str],
    notes: list[str],
    tokenizer: "Tokenizer",
) -> Layout:
    """Pads the tables and plans the transformer that config.json describes."""
    total = [-(-count // options.pad_to) * options.pad_to for count in table_rows]
    for i, count in enumerate(table_rows):
        for name in (f"table_{i}", *(("head", "head_bias") if i == 0 else ())):
            if name in tensors and tensors[name].shape[0] == count:  # otherwise ``plan`` reports the mismatch
                tensors[name] = padded(tensors[name], total[i])
    dtype = dtype_of(tensors, options.dtype)
    shape = llama.architecture(
        settings,
        input_tables=tuple(total),
        vocab=total[0],
        padding=total[0] - table_rows[0],
        tied="head" not in tensors,
        head_bias="head_bias" in tensors,
        dtype=str(dtype),
        weights=options.weights,
    )
    if options.mesh is not None:
        transformer.shardings_of(shape, placements.abstract(*mesh.parse(options.mesh)))
    if shape.int8:
        tensors = llama.quantized(tensors)
    abstract = transformer.stored_params(shape)
    return _planned(tensors, llama.RULES, abstract, None, make(shape), dropped, notes)._replace(tokenizer=tokenizer)


def dtype_of(tensors: Mapping[str, Tensor], name: str | None) -> np.dtype:
    """The dtype that is asked for by name; by default that of the files, but float32 for float16."""
    own = "bfloat16" if all(tensor.dtype == DTYPES["bfloat16"] for tensor in tensors.values()) else "float32"
    return DTYPES[name or own]


def _planned(
    tensors: dict[str, Tensor],
    rules: Sequence[Rule],
    abstract: Any,
    dtype: np.dtype | None,
    description: card.Model | CodecDescription,
    dropped: list[str],
    notes: list[str],
) -> Layout:
    """Applies the rules; parameters are of ``dtype``, or else of the types of ``abstract``."""
    expected = flatten(abstract)
    params, more = plan(tensors, rules, {path: leaf.shape for path, leaf in expected.items()})
    params = {path: cast(tensor, dtype or np.dtype(expected[path].dtype)) for path, tensor in params.items()}
    return Layout(params, description, dropped + more, notes)
