"""Loads a synthesizer by name or folder: the built-in voice or a converted model, any drafter, and a codec."""

import functools
from pathlib import Path

import jax

from jaxspec.checkpoint import pretrained, store
from jaxspec.checkpoint.pretrained import Pretrained, PretrainedCodec
from jaxspec.common.compilation_cache import describe, keep
from jaxspec.draft import ngram_draft
from jaxspec.mirror import Options
from jaxspec.models import builtin as voices
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config
from jaxspec.synthesis import converted
from jaxspec.synthesis.builtin import SAMPLING, builtin
from jaxspec.synthesis.contract import Drafter, Synthesizer, drafter_of, target_of
from jaxspec.synthesis.mirrored import draft_shape, mirrored
from jaxspec.types import Params

NGRAM = "ngram"


def load(
    model: str | Path | None = None,
    draft: str | Path | None = None,
    codec: str | Path | None = None,
    mirror: Options | None = None,
) -> Synthesizer:
    """The built-in voice or a converted model, with a drafter and a codec.

    Args:
        model: a folder that ``jaxspec convert`` made; None is the built-in voice.
        draft: "ngram", or the folder of a draft; None is the built-in voice's own draft, and no draft for a model.
        codec: the folder of a codec; by default the folder ``codec`` within that of the model, where there is one.
        mirror: the devices of the draft, which is a model of its own then; None: the target's.

    Raises:
        ValueError: a folder holds nothing of the kind, they do not fit each other, or there are too few devices.
    """
    synthesizer, shape = _builtin(draft, codec) if model is None else _converted(Path(model), draft, codec)
    if mirror is None:
        return synthesizer
    own = None if draft in (None, NGRAM) else draft_shape(draft, shape.dtype)
    make, params = mirrored(mirror, shape, own, synthesizer.drafter and synthesizer.drafter.params)
    return synthesizer._replace(mirror=make, drafter=synthesizer.drafter and synthesizer.drafter._replace(params=params))


def _converted(model: Path, draft: str | Path | None, codec: str | Path | None) -> tuple[Synthesizer, Config]:
    """The synthesizer of a folder, and the shape of its target."""
    dtype = "float32" if jax.default_backend() == "cpu" else None  # XLA turns bfloat16 into float32 there, in every step
    target = pretrained.load(model, dtype)
    codec = codec_folder(model, codec)
    drafter = load_drafter(draft, target) if draft is not None else None
    return converted.synthesizer(target, drafter, load_codec(codec) if codec else None), target.model.shape


def codec_folder(model: Path, codec: str | Path | None) -> Path | None:
    """The folder of a model's codec: the one that is given, or the folder ``codec`` within the model's, where there is one."""
    if codec is not None:
        return Path(codec)
    return model / "codec" if (model / "codec").is_dir() else None


def load_codec(folder: str | Path) -> PretrainedCodec:
    """A codec whose traced decoder is kept on disk, see ``jaxspec.common.compilation_cache``."""
    loaded = pretrained.load_codec(folder, encoder=False)
    described = store.read_description(folder)
    kept = keep(loaded.codec.decode, f"decode {described}")
    stages = tuple((name, keep(stage, f"{name} {described}")) for name, stage in loaded.codec.stages)
    return loaded._replace(codec=loaded.codec._replace(decode=kept, stages=stages))


def _builtin(draft: str | Path | None, codec: str | Path | None) -> tuple[Synthesizer, Config]:
    """The built-in voice, and the shape of its target."""
    if codec is not None:
        raise ValueError(f"expected --model with --codec, got none: leave {codec} out or give --model")
    voice, shape = builtin(), voices.load().target
    if draft is None:
        return voice, shape
    if str(draft) == NGRAM:  # which needs no description of the target
        return voice._replace(drafter=_ngram(voices.VOCAB)), shape
    drafter = load_drafter(draft, builtin_target(voice.target_params))
    return voice._replace(drafter=drafter, target=target_of(shape, drafter)), shape


def builtin_target(params: Params) -> Pretrained:
    """The target of the built-in voice as one for ``pretrained.load_draft`` and for the description of drafts trained for it.

    Args:
        params: the target's, on the device.

    Returns:
        a target with an empty tokenizer; its digest is that of the voice's target.
    """
    from tokenizers import Tokenizer, models

    voice, stops = voices.load(), (voices.STOP,)
    digest = voices.digest(voice)
    model = Model("builtin", voice.target, 0, voices.CODES, stops, 0, (), SAMPLING, "builtin", "Apache-2.0", digest=digest)
    return Pretrained(model, params, Tokenizer(models.WordLevel({}, unk_token="")), voices.BUILTIN)


def load_drafter(draft: str | Path, target: Pretrained) -> Drafter:
    """The drafter for a target, by name ("ngram") or from a folder.

    Raises:
        ValueError: the folder holds no draft, or one that does not fit the target.
    """
    if str(draft) == NGRAM:
        return _ngram(target.model.shape.vocab)
    loaded = pretrained.load_draft(draft, target)
    held = {name: value for name, value in store.read_description(draft).items() if name != "tuned"}
    return drafter_of(loaded, f"{held} in {target.model.shape.dtype}")


def _ngram(vocab: int) -> Drafter:
    return Drafter(describe(functools.partial(ngram_draft, vocab=vocab), f"ngram {vocab}"), ())
