"""The command line: arguments -> settings -> one call. No logic lives here."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxspec.speaker.contract import Settings


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
    draft: Path | None = None
    """A smaller one of the same vocabulary, such as `jaxspec convert --layers` cuts."""
    codec: Path | None = None
    """The codec of the model, converted; by default the folder codec in that of the model."""
    prompt_codes: Path | None = None
    """A .npy of the codes of a reference recording, whose voice the model goes on in."""
    prompt_text: str = Settings.reference
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
        from jaxspec import say

        names = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(
            **{name: value for name, value in vars(self).items() if name in names},
            reference=self.prompt_text,
            reference_codes=say.read_codes(self.prompt_codes) if self.prompt_codes else (),
        )
        texts = self._texts()
        speaker = say.open_speaker(self.model, self.draft, self.codec)
        outs = self._outs(len(texts), "wav" if speaker.decode else "npy")
        result = say.say(texts, outs, settings, speaker, self.plot)
        print(say.card(result, outs))
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


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts a checkpoint of PyTorch (language model or codec) into a folder that `say --model` takes."""

    source: tyro.conf.Positional[str]
    """A directory, a weight file (.safetensors, .pt, .bin), or an id of the Hugging Face hub."""
    dest: tyro.conf.Positional[Path]
    """The folder to make."""
    family: Literal["llasa", "neutts-air", "orpheus", "cosyvoice2", "cosyvoice3", "xcodec2", "neucodec", "snac"] | None = None
    """What it is; by default told from the files."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the parameters; by default as in the files (float32 for float16 and for codecs)."""
    layers: str | None = None
    """The layers to keep, such as 0,1,18-23: cuts a draft out of a target."""
    head: Literal["all", "speech"] = "all"
    """speech: the head says codes and stop ids alone, which is smaller and quicker, and another law than the checkpoint's."""
    pad_to: int = 1
    """The rows of head and tables become a multiple of it, so that a mesh divides them."""

    def run(self) -> None:
        """Converts."""
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator, if there is one, alone
        from jaxspec.convert import pipeline, report

        layers = report.layers(self.layers) if self.layers is not None else None
        options = pipeline.Options(self.family, self.dtype, layers, self.head, self.pad_to)
        print(report.card(pipeline.convert(self.source, self.dest, options, self.revision), self.dest))


@dataclasses.dataclass(frozen=True)
class Info:
    """Prints what a converted checkpoint is."""

    folder: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    json: bool = False
    """Print it as one JSON object."""

    def run(self) -> None:
        """Prints."""
        from jaxspec.convert import report

        print(report.info(self.folder, self.json))


@dataclasses.dataclass(frozen=True)
class Groups:
    """Builds the acoustic similarity groups of a converted checkpoint, keeps them in its folder, and reports them."""

    model: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    threshold: float = 0.4
    """The cosine above which two codes share a group."""
    plot: Path | None = None
    """A PNG of the histogram of their sizes."""
    json: bool = False
    """Print the report as one JSON object."""

    def run(self) -> None:
        """Builds."""
        from jaxspec.convert import report

        print(report.groups(self.model, self.threshold, self.plot, self.json))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compares verifiers on the held-out sentences: word errors, likeness of the voice, acceptance, speed."""

    out_dir: Path = Path("evaluation")
    """The folder for evaluation.json, evaluation.md and evaluation.png."""
    sentences: int = 200
    """How many of the 200 held-out sentences."""
    seeds: int = 3
    """How often each is spoken."""
    betas: tuple[float, ...] = (0.2, 0.4)
    """The tolerances to compare."""
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.85)
    """The cosines to compare."""
    matrix: Literal["target", "codec"] = Settings.matrix
    """Whose vectors the groups are made from."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round."""
    temperature: float | None = Settings.temperature
    """0 is greedy; by default 0.8."""

    def run(self) -> None:
        """Compares."""
        from jaxspec.evaluate import compare, report

        base = Settings(draft_length=self.draft_length, temperature=self.temperature, matrix=self.matrix)
        plan = compare.Plan(self.sentences, self.seeds, self.betas, self.thresholds, base)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        result = compare.compare(plan)
        report.show(result["rows"])
        report.save(self.out_dir, result)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times the speculative loop and its parts against our own autoregressive loop, beside what the device allows."""

    preset: str = "builtin"
    """builtin (the voice, real acceptance), small, llasa-1b, llasa-8b, cosyvoice2 (random weights), or a converted folder."""
    draft: Path | None = None
    """The draft of a converted folder, another one."""
    verify: tuple[Literal["exact", "tolerance", "coarse-grained"], ...] = ("exact", "coarse-grained")
    """The verifiers to time."""
    draft_lengths: tuple[int, ...] = (3,)
    """Codes that are drafted in a round."""
    batches: tuple[int, ...] = (1,)
    """Rows at once."""
    prompts: tuple[int, ...] = (64,)
    """Lengths of the prompt, for random weights."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of weights and caches."""
    synthetic_acceptance: float | None = None
    """Of each position, for random weights: drawn inside the loop in place of the verdict, whose work is done all the same."""
    new_tokens: int = 64
    """Codes that each row emits, at most."""
    turns: int = 5
    """How often each case is timed; the cases take turns."""
    auto: bool = False
    """A row more for each batch: whichever of the others proves the quickest."""
    peer: Literal["transformers"] | None = None
    """Times transformers on the same weights in the same run (preset small)."""
    out_dir: Path | None = None
    """A folder for bench.json, bench.md and bench.png."""
    trace: Path | None = None
    """A folder for a profile of the whole run, for xprof or Perfetto."""

    def run(self) -> None:
        """Times."""
        from jaxspec.bench import report, suite

        plan = suite.Plan(
            self.preset,
            self.draft,
            self.verify,
            self.draft_lengths,
            self.batches,
            self.prompts,
            self.dtypes,
            self.synthetic_acceptance,
            self.new_tokens,
            self.turns,
            self.auto,
            self.peer is not None,
        )
        with jax.profiler.trace(str(self.trace)) if self.trace else contextlib.nullcontext():
            result = suite.bench(plan)
        report.show(result)
        if self.out_dir:
            report.save(self.out_dir, result)
        print(json.dumps(result))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles the prefill and the loop for a TPU, without one: memory, operations, time, and checks of the program."""

    model: str
    """A shape that is benchmarked (small, llasa-1b, llasa-8b, cosyvoice2), or a folder that `jaxspec convert` made."""
    topology: str
    """Chips and their layout, such as v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1; one of them is planned for."""
    draft: str | None = None
    """A folder, or how many of the target's layers; by default the draft that is benchmarked with MODEL."""
    batch: int = 1
    """Rows."""
    cells: int = 2048
    """Of each row's caches: prompt, emitted tokens, and one more than are drafted."""
    prompt_length: int = 256
    """The longest prompt."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and caches."""
    json: bool = False
    """Print one JSON object as the last line."""

    def run(self) -> None:
        """Compiles."""
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator, if there is one, alone
        jax.config.update("jax_enable_compilation_cache", False)  # it cannot read what was compiled for another machine
        from jaxspec.bench import plan

        result = plan.plan(plan.Settings(**{name: value for name, value in vars(self).items() if name != "json"}))
        print(plan.card(result))
        if self.json:
            print(json.dumps(result))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts quickly."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxspec"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main() -> None:
    """The entry point of the command ``jaxspec``; exits with 2 when the input is at fault."""
    commands = {
        "say": Say,
        "convert": Convert,
        "info": Info,
        "groups": Groups,
        "evaluate": Evaluate,
        "bench": Bench,
        "plan": Plan,
    }
    parsed = tyro.extras.subcommand_cli_from_dict(
        commands, prog="jaxspec", description="Speculative decoding for speech-token models."
    )
    use_compilation_cache()
    try:
        parsed.run()
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"jaxspec: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
