"""Texts to sound files, with a card for people, one line of JSON for machines, and a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec import pretrained
from jaxspec.files import replacing
from jaxspec.speaker import pretrained as checkpoints
from jaxspec.speaker.builtin import builtin
from jaxspec.speaker.contract import Settings, Speaker
from jaxspec.state import ACCEPTED, BONUS, CORRECTION
from jaxspec.synthesize import Speech, Spoken, speak

_FORMATS = (".wav", ".flac", ".ogg")


def open_speaker(model: Path | None, draft: Path | None, codec: Path | None) -> Speaker:
    """The built-in voice, or the checkpoints in some folders; a model's codec is by default the folder ``codec`` in its own.

    Raises:
        ValueError: a folder holds nothing of the kind, or they do not fit each other.
    """
    if model is None:
        if draft or codec:
            raise ValueError("expected --model with --draft or --codec, got none: the built-in voice has its own")
        return builtin()
    dtype = "float32" if jax.default_backend() == "cpu" else None  # XLA turns bfloat16 into float32 there, in every step
    target = pretrained.load(model, dtype)
    codec = codec or (model / "codec" if (model / "codec").is_dir() else None)
    small = pretrained.load(draft, dtype, beside=target) if draft else None
    return checkpoints.speaker(target, small, pretrained.load_codec(codec) if codec else None)


def read_codes(path: Path) -> tuple[int, ...]:
    """The codes of a reference from a .npy file.

    Raises:
        ValueError: the file holds no row of codes.
    """
    try:
        with path.open("rb") as file:
            codes = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a .npy file of codes at {path}, but {error}") from error
    if codes.ndim != 1 or not np.issubdtype(codes.dtype, np.integer) or not len(codes):
        raise ValueError(f"expected a row of codes in {path}, integers [T], got {codes.dtype} {codes.shape}")
    return tuple(map(int, codes))


def say(
    texts: Sequence[str], outs: Sequence[Path], settings: Settings, speaker: Speaker, plot: Path | None = None
) -> dict[str, Any]:
    """Speaks each text into its file, and draws the first one where ``plot`` is given; returns the figures.

    Nothing is written unless everything was spoken. A file that ends in .npy gets the codes in place of the sound.

    Raises:
        ValueError: a text cannot be spoken, a file cannot be written, or its kind is unknown.
    """
    for path in (*outs, *([plot] if plot else [])):
        check_writable(path)
    for path in outs:
        check_kind(path, speaker)
    if plot and speaker.decode is None:
        raise ValueError("expected a codec for --plot, which draws sound: give --codec, or leave --plot out")
    spoken = speak(texts, settings, speaker)
    for speech, path in zip(spoken.speeches, outs, strict=True):
        write(path, speech)
    if plot:
        draw(plot, spoken.speeches[0], texts[0])
    return figures(spoken)


def check_kind(path: Path, speaker: Speaker) -> None:
    """Raises ValueError where a speaker cannot fill a file of this kind."""
    suffix = path.suffix.lower()
    if suffix not in (*_FORMATS, ".npy"):
        raise ValueError(f"expected a sound file that ends in {', '.join(_FORMATS)}, or .npy for codes, got {path}")
    if suffix != ".npy" and speaker.decode is None:
        raise ValueError(
            f"expected a codec to make sound for {path}: give --codec DIR, or --out FILE.npy for the codes "
            "(of CosyVoice they are all that comes out: its flow and vocoder are not here)"
        )


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be put."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"expected a path that can be written to, got {path}: choose a file in a folder of yours that exists")


def write(path: Path, speech: Speech) -> None:
    """Writes 16-bit samples in the format that the suffix names, or the codes; the file appears whole or not at all."""
    import soundfile

    suffix = path.suffix.lower()
    with replacing(path) as partial:
        if suffix == ".npy":
            with partial.open("wb") as file:  # to a path, numpy would add the suffix in small letters
                np.save(file, speech.codes)
            return
        soundfile.write(partial, speech.wave, speech.sample_rate_hz, subtype="VORBIS" if suffix == ".ogg" else "PCM_16")


def figures(spoken: Spoken) -> dict[str, Any]:
    """What was said and what it took; rtf is compute seconds (compiling apart) over audio seconds, None without audio."""
    audio_s = sum(len(speech.wave) / max(speech.sample_rate_hz, 1) for speech in spoken.speeches)
    lm_s, codec_s = spoken.seconds["lm"], spoken.seconds["codec"]
    return {
        "audio_seconds": round(audio_s, 3),
        "lm_seconds": round(lm_s, 3),
        "codec_seconds": round(codec_s, 3),
        "compile_seconds": round(spoken.seconds["compile"], 3),
        "rtf": round((lm_s + codec_s) / audio_s, 4) if audio_s else None,
        **spoken.counts,
    }


def card(result: dict[str, Any], outs: Sequence[Path]) -> str:
    """The figures for people, a line each."""
    files = str(outs[0]) if len(outs) == 1 else f"{len(outs)} files in {outs[0].parent}"
    seconds, rtf = (
        result["lm_seconds"] + result["codec_seconds"],
        f" (rtf {result['rtf']:.3f})" if result["audio_seconds"] else "",
    )
    lines = [
        f"{result['audio_seconds']:.2f} s of speech in {files}"
        if result["audio_seconds"]
        else f"codes, and no sound, in {files}",
        f"computed in {seconds:.2f} s{rtf}, compiled in {result['compile_seconds']:.2f} s",
    ]
    if result["drafted"]:
        lines.append(
            f"{result['verify']}: {result['tokens']} codes in {result['rounds']} rounds of {result['tokens_per_round']:.2f}, "
            f"{result['acceptance_rate']:.0%} of those drafted accepted"
        )
    else:
        lines.append(f"{result['verify']}: {result['tokens']} codes, one at a time")
    return "\n".join(lines)


def draw(path: Path, speech: Speech, title: str) -> None:
    """Draws the waveform, the mel spectrogram, and a strip that shows each code as accepted, correction or bonus, as PNG."""
    import librosa
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    duration = len(speech.wave) / speech.sample_rate_hz
    figure = Figure(figsize=(max(7.0, min(2.2 * duration, 24.0)), 5), layout="constrained")
    wave, mel, strip = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 0.5))
    wave.plot(np.arange(len(speech.wave)) / speech.sample_rate_hz, speech.wave, linewidth=0.4, color="#335577")
    wave.set(title=title if len(title) < 100 else title[:97] + "...", ylabel="amplitude", xlim=(0, duration))
    power = librosa.feature.melspectrogram(y=speech.wave, sr=speech.sample_rate_hz, n_fft=640, hop_length=160, n_mels=80)
    extent = (0, duration, 0, 80)
    mel.imshow(librosa.power_to_db(power, ref=np.max), origin="lower", aspect="auto", extent=extent, vmin=-70, cmap="magma")
    mel.set(ylabel="mel bin")
    names = {ACCEPTED: ("accepted", "#55a868"), CORRECTION: ("correction", "#c44e52"), BONUS: ("bonus", "#4c72b0")}
    colours = ListedColormap([colour for _, colour in names.values()])
    strip.imshow(speech.origin.reshape(1, -1), aspect="auto", extent=(0, duration, 0, 1), cmap=colours, vmin=0, vmax=2)
    strip.set(xlabel="seconds", yticks=[], ylabel="codes")
    strip.legend(
        handles=[Patch(color=colour, label=label) for label, colour in names.values()],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.9),
        ncols=3,
        frameon=False,
    )
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
