"""The picture of an utterance: waveform, mel spectrogram, and the outcome of each code."""

from pathlib import Path

import numpy as np

from jaxspec.common.files import replacing
from jaxspec.state import ACCEPTED, BONUS, CORRECTION
from jaxspec.synthesis.pipeline import Utterance


def draw(path: Path, utterance: Utterance, title: str) -> None:
    """Draws as PNG the waveform, the mel spectrogram, and each code as accepted, correction or bonus token."""
    import librosa
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    duration = len(utterance.wave) / utterance.sample_rate_hz
    figure = Figure(figsize=(max(7.0, min(2.2 * duration, 24.0)), 5), layout="constrained")
    wave, mel, strip = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 0.5))
    wave.plot(np.arange(len(utterance.wave)) / utterance.sample_rate_hz, utterance.wave, linewidth=0.4, color="#335577")
    wave.set(title=title if len(title) < 100 else title[:97] + "...", ylabel="amplitude", xlim=(0, duration))
    padded = np.pad(utterance.wave, (0, max(640 - len(utterance.wave), 0)))  # at least one window
    power = librosa.feature.melspectrogram(y=padded, sr=utterance.sample_rate_hz, n_fft=640, hop_length=160, n_mels=80)
    extent = (0, duration, 0, 80)
    mel.imshow(librosa.power_to_db(power, ref=np.max), origin="lower", aspect="auto", extent=extent, vmin=-70, cmap="magma")
    mel.set(ylabel="mel bin")
    names = {ACCEPTED: ("accepted", "#55a868"), CORRECTION: ("correction", "#c44e52"), BONUS: ("bonus", "#4c72b0")}
    colours = ListedColormap([colour for _, colour in names.values()])
    strip.imshow(utterance.origin.reshape(1, -1), aspect="auto", extent=(0, duration, 0, 1), cmap=colours, vmin=0, vmax=2)
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
