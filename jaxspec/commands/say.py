"""The command `say`: texts to sound files, with a card for people, one line of JSON for machines, and a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from jaxspec.commands.outputs import check_kind, check_writable, write
from jaxspec.commands.picture import draw
from jaxspec.synthesis.contract import Reference, Settings, Synthesizer
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import SynthesisResult, speak


@dataclasses.dataclass(frozen=True)
class Say:
    """Speaks a text into a sound file, or each line of a file into a file of its own."""

    text: tyro.conf.Positional[str | None] = None
    """What to say."""
    out: Path | None = None
    """The sound file to write: .wav, .flac or .ogg; or .npy for the codes."""
    file: Path | None = None
    """A text file, one text a line, in place of TEXT."""
    out_dir: Path | None = None
    """The folder for 001.wav, 002.wav ... when --file is given; .npy of codes where there is no codec."""
    model: Path | None = None
    """A checkpoint that `jaxspec convert` made; without it, the built-in voice."""
    draft: str | None = None
    """ngram, or the folder of a draft of the same vocabulary, such as `jaxspec convert --layers` makes."""
    codec: Path | None = None
    """The codec of the model, converted; by default the folder codec in that of the model."""
    reference: Path | None = None
    """A .npy file with the codes of a reference recording, whose voice the model continues in."""
    reference_text: str = ""
    """What the reference recording says."""
    max_codes: int | None = Settings.max_codes
    """The most tokens of each piece of the text."""
    voice: str | None = Settings.voice
    """Of the built-in voice slt (a woman) or rms (a man); of a model one that it knows."""
    verify: Literal["exact", "tolerance", "coarse-grained", "autoregressive", "auto"] | None = Settings.verify
    """The rule by which drafted codes are accepted; by default coarse-grained, and autoregressive without a draft. Of the batches
    of many texts, auto tries both and goes on with the quicker."""
    beta: float = Settings.beta
    """The tolerance of --verify tolerance."""
    threshold: float | None = Settings.threshold
    """The cosine above which two codes share a group, for --verify coarse-grained; by default 0.85, and 0.4 for a model."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round; 0 is autoregressive."""
    temperature: float | None = Settings.temperature
    """0 is greedy; by default 0.8, or the model's own."""
    seed: int = Settings.seed
    """The same seed gives the same samples."""
    plot: Path | None = None
    """A PNG of the waveform, the mel spectrogram and the fate of each code."""
    json: bool = False
    """Print one JSON object as the last line."""

    def run(self) -> None:
        """Speaks."""
        names = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(
            **{name: value for name, value in vars(self).items() if name in names - {"reference"}},
            reference=read_reference(self.reference, self.reference_text),
        )
        texts = self._texts()
        synthesizer = load(self.model, self.draft, self.codec)
        outs = self._outs(len(texts), "wav" if synthesizer.decode else "npy")
        result = say(texts, outs, settings, synthesizer, self.plot)
        print(card(result, outs))
        if self.json:
            print(json.dumps(result))

    def _texts(self) -> list[str]:
        if self.file is None:
            if self.text is None or self.out is None:
                raise ValueError('expected a text and where to write it: jaxspec say "..." --out hello.wav')
            return [self.text]
        if self.out_dir is None or self.text is not None:
            raise ValueError(
                "expected --file together with --out-dir and without a text: jaxspec say --file texts.txt --out-dir out"
            )
        try:
            texts = [line for line in self.file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected a text file in UTF-8 at {self.file}: {error}") from error
        if not texts:
            raise ValueError(f"expected one text a line in {self.file}, but it is empty")
        return texts

    def _outs(self, count: int, kind: str) -> list[Path]:
        if self.file is None:
            return [self.out]
        self.out_dir.mkdir(parents=True, exist_ok=True)
        return [self.out_dir / f"{number:03d}.{kind}" for number in range(1, count + 1)]


def read_reference(path: Path | None, text: str) -> Reference | None:
    """A reference from a .npy file of codes and the text that the recording says.

    Raises:
        ValueError: the file holds no codes, or there is a text without a file.
    """
    if path is None:
        if text:
            raise ValueError("expected --reference with --reference-text, got the text only: give both")
        return None
    try:
        with path.open("rb") as file:
            codes = np.lib.format.read_array(file, allow_pickle=False)
        return Reference(text, codes)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a .npy file of reference codes at {path}, but {error}") from error


def say(
    texts: Sequence[str], outs: Sequence[Path], settings: Settings, synthesizer: Synthesizer, plot: Path | None = None
) -> dict[str, Any]:
    """Speaks each text into its file, and draws the first one where ``plot`` is given; returns the figures.

    Nothing is written unless everything was spoken. A file that ends in .npy gets the codes in place of the sound.

    Raises:
        ValueError: a text cannot be spoken, a file cannot be written, or its kind is unknown.
    """
    for path in (*outs, *([plot] if plot else [])):
        check_writable(path)
    for path in outs:
        check_kind(path, synthesizer)
    if plot and synthesizer.decode is None:
        raise ValueError("expected a codec for --plot, which draws sound: give --codec, or leave --plot out")
    spoken = speak(texts, settings, synthesizer)
    for utterance, path in zip(spoken.utterances, outs, strict=True):
        write(path, utterance)
    if plot:
        draw(plot, spoken.utterances[0], texts[0])
    return figures(spoken)


def figures(spoken: SynthesisResult) -> dict[str, Any]:
    """What was said and what it took; rtf is compute seconds (compiling apart) over audio seconds, None without audio."""
    audio_s = sum(len(utterance.wave) / max(utterance.sample_rate_hz, 1) for utterance in spoken.utterances)
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
