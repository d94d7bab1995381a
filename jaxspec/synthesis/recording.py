"""A recording as the reference of a converted model: its codes and, where the codec's decoder takes one, its condition."""

import functools
from pathlib import Path

import numpy as np

from jaxspec.audio.files import check_reference
from jaxspec.audio.resample import resample
from jaxspec.checkpoint import voices
from jaxspec.checkpoint.pretrained import Pretrained, PretrainedCodec, load_codec
from jaxspec.codec.padding import encode_rows
from jaxspec.models.card import Model
from jaxspec.synthesis.contract import Reference, Settings


def reference(target: Pretrained, codec: PretrainedCodec | None, wave: np.ndarray, rate: int, text: str) -> Reference:
    """Encodes a recording.

    Args:
        target: whose reference it becomes.
        codec: from a folder that has its encoder.
        wave: float32 [N], mono.
        rate: of the wave in Hz.
        text: what the recording says.

    Raises:
        ValueError: it is no recording of some seconds of speech, the codec has no encoder, or the text is missing where the model
            needs it.
    """
    model = target.model
    check_reference(wave, rate)
    codec = codec and load_codec(codec.folder)  # with its encoder, which is large and only needed here
    if codec is None or codec.codec.encode is None:
        got = "no codec" if codec is None else "one that was converted without it"
        raise ValueError(f"expected the codec of {model.family} with its encoder for a recording, got {got}: convert it whole")
    if codec.codec.condition is not None:
        codes, condition = codec.codec.condition(codec.params, wave, rate)
        return Reference(text, codes, condition)
    if not text.strip():
        raise ValueError(f"expected what the recording says for {model.family}, got nothing: give --reference-text")
    return Reference(text, encode(codec, [(wave, rate)])[0])


def encode(codec: PretrainedCodec, recordings: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    """Encodes a batch of recordings.

    Args:
        codec: with its encoder.
        recordings: waves float32 [N], mono, and their rates in Hz.

    Returns:
        The codes of each, int32 [T], or [T Q] where a frame has Q codes.

    Raises:
        ValueError: the codec has no encoder.
    """
    model = codec.codec
    rate_hz = model.encode_rate_hz or model.sample_rate_hz
    rows = encode_rows(model, codec.params, [resample(wave, rate, rate_hz) for wave, rate in recordings])
    return [row[:, 0] if row.shape[1] == 1 else row for row in rows]


def of_settings(target: Pretrained, codec: PretrainedCodec | None, settings: Settings) -> Reference | None:
    """The reference that the settings give, or the voice that they name among those added to the model.

    Raises:
        ValueError: there is no such voice, another codec encoded it, or the codec's decoder needs a voice and none is given.
    """
    model, name = target.model, settings.voice
    if settings.reference is not None or (name and name in model.voices) or (name and not model.clones):
        return settings.reference
    if name:
        return _added(target.folder, model, name, codec.digest if codec else "")
    if codec is not None and codec.codec.condition is not None:
        known = (*model.voices, *voices.names(target.folder))
        choice = f"--voice with one of {', '.join(known)}" if known else "add one with `jaxspec voice add`"
        raise ValueError(f"expected a voice for {model.family}, got none: give --reference speaker.wav, or {choice}")
    return None


@functools.lru_cache  # every request asks, and the codec once more
def _added(folder: Path, model: Model, name: str, digest: str) -> Reference:
    known = (*model.voices, *voices.names(folder))
    if name not in known:
        some = f"among {', '.join(known)}" if known else f"of {model.family}, which has none yet"
        raise ValueError(f"expected a voice {some}, got {name!r}: add it with jaxspec voice add, or give --reference")
    stored = voices.read(voices.path_of(folder, name))
    if digest and stored.encoder != digest:
        raise ValueError(f"expected the voice {name} of the codec {digest}, got one of {stored.encoder}: add it again")
    return Reference(stored.text, stored.codes, stored.condition)
