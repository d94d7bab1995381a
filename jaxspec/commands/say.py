"""The command `say`: texts to sound files, with a card for people, JSON for machines, and a picture."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import jaxspec
from jaxspec import mirror
from jaxspec.checkpoint.store import DESCRIPTION
from jaxspec.commands import outputs
from jaxspec.commands.console import progress_bar, report
from jaxspec.commands.inputs import check_reference_file, read_lines, read_reference, read_text
from jaxspec.commands.manifest import MANIFEST, Manifest, digest
from jaxspec.commands.mesh import OnMesh
from jaxspec.commands.picture import draw
from jaxspec.commands.streaming import say_stream
from jaxspec.common import hosts
from jaxspec.synthesis.contract import Settings, Synthesizer, Verifier
from jaxspec.synthesis.decoding import resolve
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import Tally, Utterance, speak_each

STAGES = ("lm", "codec", "flow", "vocoder")  # that are timed apart, as far as a model has them


class Job(NamedTuple):
    """A text, the line that it comes from, and the file that it goes to."""

    line: int
    text: str
    out: Path


class Outcome(NamedTuple):
    """What became of some jobs: seconds of sound, times and counts, and the lines that could not be spoken, with the reasons."""

    audio_s: float
    tally: Tally
    written: int
    failed: dict[int, str]


@dataclasses.dataclass(frozen=True)
class Say(OnMesh):
    """Speaks a text into a sound file, or each line of a file into a file of its own."""

    text: tyro.conf.Positional[str | None] = None
    """What to say; - or nothing reads standard input."""
    out: Path | None = None
    """The sound file to write: .wav, .flac, .ogg or .mp3; or .npy for the codes. With --stream: .wav, or nothing for standard
    output."""
    stream: bool = False
    """Write sound while the rest is still decoded; to standard output: jaxspec say "..." --stream | aplay."""
    file: Path | None = None
    """A text file, one text on each line, in place of TEXT; - is standard input."""
    out_dir: Path | None = None
    """The folder for 001.wav, 002.wav ... of --file, and for manifest.jsonl, which lists them."""
    format: Literal["wav", "flac", "ogg", "mp3", "npy", "pcm"] | None = None
    """Of the files in --out-dir; by default wav, and npy (codes) where the model has no codec. With --stream: wav, or pcm for
    16-bit samples without a header."""
    resume: bool = False
    """Skip the files in --out-dir that were written for the same line, text and arguments."""
    model: Path | None = None
    """A checkpoint that `jaxspec convert` made; by default the built-in voice."""
    draft: str | None = None
    """ngram, or the folder of a draft for the model, such as `jaxspec convert --layers` makes; by default the built-in voice's
    own, and none for a model."""
    codec: Path | None = None
    """The folder of the model's codec; by default the folder codec in that of the model."""
    reference: Path | None = None
    """A recording of some seconds (.wav, .flac, .mp3, .ogg), in whose voice the model speaks; or a .npy file with its codes."""
    reference_text: str = ""
    """What the reference recording says."""
    instruct: str = Settings.instruct
    """How to speak, for a model that takes an instruction (CosyVoice)."""
    max_codes: int | None = Settings.max_codes
    """The most tokens of each piece of a text; by default the model's own limit."""
    voice: str | None = Settings.voice
    """slt (a woman, the default) or rms (a man) for the built-in voice; one that the model knows, or that
    `jaxspec voice add` made for it, for others."""
    verify: Verifier | None = None
    """How drafted codes are accepted; by default as `jaxspec tune` chose for the draft, else coarse-grained, and autoregressive
    without a draft. block- verifies them as a whole, which accepts more of them. auto tries both on the batches of many texts and
    continues with the faster one."""
    beta: float = Settings.beta
    """The tolerance of --verify tolerance, 0 to 1."""
    threshold: float | None = Settings.threshold
    """The cosine above which two codes share a group, for --verify coarse-grained; by default as `jaxspec tune` chose for the
    draft, else 0.85, and 0.4 for a model."""
    draft_length: int | None = Settings.draft_length
    """How many codes are drafted in a round; 0 is autoregressive; by default as `jaxspec tune` chose for the draft, else 3."""
    temperature: float | None = Settings.temperature
    """0 is greedy; by default 0.8, or the model's own."""
    top_k: int | None = Settings.top_k
    """Sample from the k most probable codes only; 0 is off; by default the model's own."""
    top_p: float | None = Settings.top_p
    """Sample from the most probable codes that together reach this probability; by default 0.95, or the model's own."""
    min_p: float | None = Settings.min_p
    """Sample from codes with at least this share of the best one's probability; 0 is off; by default the model's own."""
    seed: int = Settings.seed
    """The same seed gives the same samples; any whole number from 0 up."""
    mirror: str | None = None
    """Draft on devices of their own, the last ones, while the target verifies: draft=1, or draft=1,candidates=4,exit=6. The draft
    is a model of its own."""
    plot: Path | None = None
    """A PNG of the waveform, the mel spectrogram and the origin of each code, of the first text."""
    json: bool = False
    """Print one JSON object on standard output, and the card on standard error; both on standard error where standard output is
    sound."""

    def run(self) -> None:
        """Speaks."""
        settings, texts = self._settings(), self._texts()
        options = None if self.mirror is None else mirror.parse(self.mirror)
        check_reference_file(self.reference, self.reference_text)
        if self.out is not None:
            outputs.check_output(self.out)
        if self.out_dir is not None:
            outputs.make_folder(self.out_dir)
            outputs.check_writable(self.out_dir / MANIFEST)
        if self.plot:
            outputs.check_picture(self.plot)
        synthesizer = load(self.model, self.draft, self.codec, options)
        if self.reference is not None:
            reference = read_reference(self.reference, self.reference_text, synthesizer)
            settings = dataclasses.replace(settings, reference=reference)
        if self.stream:
            self._stream(texts[1], settings, synthesizer)
            return
        jobs = self._jobs(texts, self.format or ("wav" if synthesizer.decode else "npy"))
        check_codec(synthesizer, jobs[0].out, self.plot)
        manifest = Manifest(self.out_dir) if self.out_dir else None
        outcome = say(jobs, settings, synthesizer, manifest, self.resume, self._request(), self.plot)
        result = figures(outcome, settings, resolve(synthesizer, settings).name)
        where = str(self.out) if self.file is None else f"{outcome.written} of {len(jobs)} files in {self.out_dir}"
        report(card(result, where), result, self.json)
        if outcome.failed:
            reasons = "".join(f"\n  line {line}: {reason}" for line, reason in outcome.failed.items())
            raise ValueError(
                f"expected texts that can be spoken, got {len(outcome.failed)} of {len(jobs)} lines that cannot: "
                f"correct them and run again with --resume{reasons}"
            )

    def divided(self) -> Path | None:
        """See ``OnMesh``."""
        return self.model

    def _settings(self) -> Settings:
        names = {field.name for field in dataclasses.fields(Settings)} & set(vars(self)) - {"reference"}
        return Settings(**{name: getattr(self, name) for name in names})

    def _stream(self, text: str, settings: Settings, synthesizer: Synthesizer) -> None:
        tally, timing = say_stream(text, settings, synthesizer, self.out, self.format == "pcm")
        outcome = Outcome(sum(timing.durations), tally, 1, {})
        result = figures(outcome, settings, resolve(synthesizer, settings).name) | timing.figures()
        first = f"first audio after {result['time_to_first_audio_s']:.3f} s, {result['underruns']} underruns at real-time play"
        shown = f"{card(result, str(self.out or 'standard output'))}\n{first}"
        with contextlib.redirect_stdout(sys.stdout if self.out else sys.stderr):
            report(shown, result, self.json)

    def _texts(self) -> dict[int, str]:
        """The texts by their lines."""
        if self.stream:
            others = (
                self.file,
                self.out_dir,
                self.plot,
                self.mirror,
                self.resume or None,
                None if self.format in (None, "wav", "pcm") else 1,
            )
            if any(other is not None for other in others) or (self.out and self.out.suffix.lower() != ".wav"):
                raise ValueError(
                    "expected --stream with a text, and --out FILE.wav or --format pcm at most, got more: leave it out"
                )
            return {1: read_text(self.text)}
        if self.format == "pcm":
            raise ValueError("expected --stream with --format pcm, got it without: choose wav for files")
        if self.file is None:
            if self.out is None or self.out_dir is not None or self.resume or self.format:
                raise ValueError(
                    'expected --out for a text, and --file for --out-dir, --format and --resume: say "..." --out a.wav'
                )
            return {1: read_text(self.text)}
        if self.out_dir is None or self.out is not None or self.text is not None:
            raise ValueError("expected --file with --out-dir, and without a text or --out: say --file texts.txt --out-dir out")
        return read_lines(self.file)

    def _jobs(self, texts: dict[int, str], kind: str) -> list[Job]:
        """A text goes to --out, and the lines of a file to 001.wav, 002.wav ... in --out-dir."""
        if self.out is not None:
            return [Job(line, text, self.out) for line, text in texts.items()]
        folder = self.out_dir or Path()
        return [Job(line, text, folder / f"{index:03d}.{kind}") for index, (line, text) in enumerate(texts.items(), 1)]

    def _request(self) -> dict[str, Any]:
        """What the files depend on beside their texts: the arguments, and what the folders and files that they name hold."""
        arguments = {name: value for name, value in vars(self).items() if name not in _NOT_HEARD}
        folders = [self.model, Path(self.draft) if self.draft else None, self.codec]
        held = digest({}, [*(folder / DESCRIPTION if folder else None for folder in folders), self.reference])
        return arguments | {"held": held, "version": jaxspec.__version__}


# Arguments that no file depends on.
_NOT_HEARD = {"text", "out", "file", "out_dir", "resume", "plot", "json", "mesh", "distributed", "mirror"}


def check_codec(synthesizer: Synthesizer, out: Path, plot: Path | None) -> None:
    """Refuses sound and pictures where there is no codec.

    Raises:
        ValueError: with what to do.
    """
    if synthesizer.decode is None and out.suffix.lower() != outputs.CODES:
        raise ValueError(f"expected a codec to make sound for {out}, got none: give --codec DIR, or --out FILE.npy for the codes")
    if synthesizer.decode is None and plot:
        raise ValueError("expected a codec for --plot, which draws sound, got none: give --codec, or leave --plot out")


def say(
    jobs: Sequence[Job],
    settings: Settings,
    synthesizer: Synthesizer,
    manifest: Manifest | None = None,
    resume: bool = False,
    request: dict[str, Any] | None = None,
    plot: Path | None = None,
) -> Outcome:
    """Speaks each job and writes its file as soon as it is done.

    Raises:
        ValueError: none of the texts can be spoken, for one reason.
    """
    decoding, tally, failed, audio_s, written = resolve(synthesizer, settings), Tally(), {}, 0.0, 0
    digests = [digest({**(request or {}), "line": i, "text": job.text}, []) for i, job in enumerate(jobs)]
    held = resume and manifest and manifest.holds
    skip = set(hosts.from_first(lambda: [i for i, job in enumerate(jobs) if held and held(job.out.name, digests[i])]))
    try:
        with progress_bar("speaking") as progress:
            texts = [job.text for job in jobs]
            for i, utterance in speak_each(texts, settings, synthesizer, decoding, tally, skip=skip, progress=progress):
                if isinstance(utterance, ValueError):
                    failed[jobs[i].line] = str(utterance)
                    if len(failed) == len(jobs) and len(set(failed.values())) == 1:
                        raise utterance
                    continue
                outputs.write(jobs[i].out, utterance)
                if manifest:
                    manifest.add(jobs[i].out.name, jobs[i].line, jobs[i].text, digests[i])
                if plot and i == 0:
                    draw(plot, utterance, jobs[i].text)
                audio_s, written = audio_s + seconds_of(utterance), written + 1
    except KeyboardInterrupt:
        if manifest is None:
            raise
        done = len(skip) + written
        raise KeyboardInterrupt(f"{done} of {len(jobs)} files are written, --resume continues with the others") from None
    return Outcome(audio_s, tally, written + len(skip), failed)


def seconds_of(utterance: Utterance) -> float:
    """The duration of an utterance; 0 where it is codes only."""
    return len(utterance.wave) / max(utterance.sample_rate_hz, 1)


def figures(outcome: Outcome, settings: Settings, name: str) -> dict[str, Any]:
    """What was said and what it took; rtf is compute seconds (compilation excluded) over audio seconds, None without audio."""
    seconds = dict(outcome.tally.watch.seconds)
    compiling = seconds.pop("compile")
    compute_s = sum(seconds.values())
    stages = {f"{name}_seconds": round(took, 3) for name, took in seconds.items()}
    return {
        "audio_seconds": round(outcome.audio_s, 3),
        **stages,
        "compile_seconds": round(compiling, 3),
        "compute_seconds": round(compute_s, 3),
        "rtf": round(compute_s / outcome.audio_s, 4) if outcome.audio_s else None,
        **outcome.tally.counts(name, settings.seed),
        "failed": outcome.failed,
    }


def card(result: dict[str, Any], where: str) -> str:
    """The figures for people, a line each."""
    stages = ", ".join(f"{name} {result[f'{name}_seconds']:.2f}" for name in STAGES if f"{name}_seconds" in result)
    computed = f"computed in {result['compute_seconds']:.2f} s ({stages})"
    rtf = f" (real-time factor {result['rtf']:.3f})" if result["rtf"] else ""
    lines = [
        f"{result['audio_seconds']:.2f} s of speech: {where}" if result["rtf"] else f"codes only, no sound: {where}",
        f"{computed}{rtf}, after {result['compile_seconds']:.2f} s of compilation",
    ]
    if result["drafted"]:
        lines.append(
            f"{result['verify']}: {result['tokens']} codes in {result['rounds']} rounds of {result['tokens_per_round']:.2f}, "
            f"{result['acceptance_rate']:.0%} of the drafted codes accepted"
        )
    else:
        lines.append(f"{result['verify']}: {result['tokens']} codes, one per step")
    return "\n".join(lines)
