"""The codec of CosyVoice 2 and 3 from the files beside ``llm.pt``: flow, vocoder, encoders and named voices."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.acoustic import cosyvoice as sound
from jaxspec.acoustic import flow as flow_networks
from jaxspec.acoustic import hift as vocoder_networks
from jaxspec.checkpoint.descriptions import CodecDescription
from jaxspec.checkpoint.tensors import Tensor, cast
from jaxspec.checkpoint.voices import Voice
from jaxspec.codec import campplus as speaker_networks
from jaxspec.codec import s3 as tokenizer_networks
from jaxspec.common.trees import flatten
from jaxspec.convert import campplus, flow, hift, onnx, pickles, s3
from jaxspec.convert.core import fold_weight_norm, plan
from jaxspec.models.cosyvoice import V2, Version

FLOW, VOICES = "flow.pt", "spk2info.pt"
LICENCE = "Apache-2.0"

Tensors = Mapping[str, Tensor]


class Part(NamedTuple):
    """A part of the codec: its file, which may depend on the version, how it is read, its rules and its parameters."""

    file: str
    read: Callable[[Path], Tensors]
    config: Callable[[Tensors], tuple[Any, Any]]
    abstract_params: Callable[[Any], Any]


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


_DECODER = {
    "flow": Part(FLOW, pickles.tensors, lambda some: flow.config(_shapes(some)), flow_networks.abstract_params),
    "vocoder": Part(
        "hift.pt",
        lambda path: fold_weight_norm(pickles.tensors(path)),
        lambda some: hift.config(_shapes(some)),
        vocoder_networks.abstract_params,
    ),
}
_ENCODER = {
    "encoder/tokenizer": Part(
        "speech_tokenizer_v{}.onnx", lambda path: s3.own(onnx.tensors(path)), s3.config, tokenizer_networks.abstract_params
    ),
    "encoder/speaker": Part(
        "campplus.onnx", lambda path: campplus.own(onnx.tensors(path)), campplus.config, speaker_networks.abstract_params
    ),
}


class Sound(NamedTuple):
    """A codec ready to be saved: its description, its parameters, and the names of the tensors left out."""

    description: CodecDescription
    params: dict[str, Tensor]
    dropped: list[str]


def layout(folder: Path, version: Version, encoder: bool) -> Sound:
    """Plans the conversion of the codec.

    Args:
        folder: of the checkpoint.
        version: of the language model.
        encoder: whether to convert the speech tokenizer and the speaker encoder too.

    Raises:
        ValueError: a file is missing, damaged or of another network, or the flow is of the other version.
    """
    number = 2 if version is V2 else 3
    configs, params, dropped = {}, {}, []
    for name, part in (_DECODER | _ENCODER if encoder else _DECODER).items():
        path = folder / part.file.format(number)
        if not path.is_file():
            raise ValueError(
                f"expected {path.name} beside {FLOW}, got none in {folder}: download it too, or convert --without-encoder"
            )
        try:
            tensors = part.read(path)
            configs[name], rules = part.config(tensors)
            expected = {at: leaf.shape for at, leaf in flatten(part.abstract_params(configs[name])).items()}
            made, left = plan(tensors, rules, expected)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        params |= {f"{name}/{at}": cast(tensor, np.dtype(np.float32)) for at, tensor in made.items()}
        dropped += left
    if configs["flow"].version != number:
        raise ValueError(f"expected {FLOW} of {version.name}, as llm.pt is, got that of the other version: download both again")
    encoders = sound.Encoder(configs["encoder/tokenizer"], configs["encoder/speaker"]) if encoder else None
    config = sound.Config(configs["flow"], configs["vocoder"], sound.FMAX_HZ[number], encoders)
    return Sound(CodecDescription(version.name, dataclasses.asdict(config), LICENCE), params, dropped)


def voices(folder: Path, digest: str) -> dict[str, Voice]:
    """The named voices of a checkpoint, which have a speaker's embedding and no prompt.

    Args:
        folder: of the checkpoint; there are none without ``VOICES``.
        digest: of the codec.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / VOICES
    tensors = pickles.nested(path) if path.exists() else {}
    speakers = {name.removesuffix("/embedding"): tensor for name, tensor in tensors.items() if name.endswith("/embedding")}
    none = np.zeros(0, np.int32)
    return {name: Voice("", none, sound.condition(tensor.all()), digest) for name, tensor in speakers.items()}
