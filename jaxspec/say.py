"""Texts to sound files, with a card for people, one line of JSON for machines, and a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.files import replacing
from jaxspec.state import ACCEPTED, BONUS, CORRECTION
from jaxspec.synthesize import Settings, Speech, Spoken, speak

_FORMATS = (".wav", ".flac", ".ogg")


def say(texts: Sequence[str], outs: Sequence[Path], settings: Settings, plot: Path | None = None) -> dict[str, Any]:
    """Speaks each text into its file, and draws the first one where ``plot`` is given; returns the figures.

    Nothing is written unless everything was spoken.

    Raises:
        ValueError: a text cannot be spoken, a file cannot be written, or its kind is unknown.
    """
    for path in (*outs, *([plot] if plot else [])):
        check_writable(path)
    for path in outs:
        if path.suffix.lower() not in _FORMATS:
            raise ValueError(f"expected a sound file that ends in {', '.join(_FORMATS)}, got {path}")
    spoken = speak(texts, settings)
    for speech, path in zip(spoken.speeches, outs, strict=True):
        write(path, speech)
    if plot:
        draw(plot, spoken.speeches[0], texts[0])
    return figures(spoken)


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be put."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"expected a path that can be written to, got {path}: choose a file in a folder of yours that exists")


def write(path: Path, speech: Speech) -> None:
    """Writes 16-bit samples in the format that the suffix names; the file appears whole or not at all."""
    import soundfile

    with replacing(path) as partial:
        soundfile.write(partial, speech.wave, speech.sample_rate_hz, subtype="VORBIS" if path.suffix == ".ogg" else "PCM_16")


def figures(spoken: Spoken) -> dict[str, Any]:
    """What was said and what it took; rtf is compute seconds (compiling apart) over audio seconds."""
    audio_s = sum(len(speech.wave) / speech.sample_rate_hz for speech in spoken.speeches)
    lm_s, codec_s = spoken.seconds["lm"], spoken.seconds["codec"]
    return {
        "audio_seconds": round(audio_s, 3),
        "lm_seconds": round(lm_s, 3),
        "codec_seconds": round(codec_s, 3),
        "compile_seconds": round(spoken.seconds["compile"], 3),
        "rtf": round((lm_s + codec_s) / max(audio_s, 1e-9), 4),
        **spoken.counts,
    }


def card(result: dict[str, Any], outs: Sequence[Path]) -> str:
    """The figures for people, a line each."""
    files = str(outs[0]) if len(outs) == 1 else f"{len(outs)} files in {outs[0].parent}"
    lines = [
        f"{result['audio_seconds']:.2f} s of speech in {files}",
        f"computed in {result['lm_seconds'] + result['codec_seconds']:.2f} s (rtf {result['rtf']:.3f}), "
        f"compiled in {result['compile_seconds']:.2f} s",
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
    strip.imshow(speech.origin[None], aspect="auto", extent=(0, duration, 0, 1), cmap=colours, vmin=0, vmax=2)
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
