"""The command line: arguments -> settings -> one call. No logic lives here."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxspec.synthesize import Settings


@dataclasses.dataclass(frozen=True)
class Say:
    """Speaks a text into a sound file, or each line of a file into a file of its own."""

    text: tyro.conf.Positional[str | None] = None
    """What to say."""
    out: Path | None = None
    """The sound file to write: .wav, .flac or .ogg."""
    file: Path | None = None
    """A text file, one text a line, in place of TEXT."""
    out_dir: Path | None = None
    """The folder for 001.wav, 002.wav ... when --file is given."""
    voice: str = Settings.voice
    """slt (a woman) or rms (a man)."""
    verify: Literal["exact", "tolerance", "coarse-grained", "autoregressive"] = Settings.verify
    """The rule by which drafted codes are accepted."""
    beta: float = Settings.beta
    """The tolerance of --verify tolerance."""
    threshold: float = Settings.threshold
    """The cosine above which two codes share a group, for --verify coarse-grained."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round; 0 is autoregressive."""
    temperature: float = Settings.temperature
    """0 is greedy."""
    seed: int = Settings.seed
    """The same seed gives the same samples."""
    plot: Path | None = None
    """A PNG of the waveform, the mel spectrogram and the fate of each code."""
    json: bool = False
    """Print one JSON object as the last line."""

    def run(self) -> None:
        """Speaks."""
        from jaxspec import say

        texts, outs = self._texts()
        names = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(**{name: value for name, value in vars(self).items() if name in names})
        result = say.say(texts, outs, settings, self.plot)
        print(say.card(result, outs))
        if self.json:
            print(json.dumps(result))

    def _texts(self) -> tuple[list[str], list[Path]]:
        if self.file is None:
            if self.text is None or self.out is None:
                raise ValueError('expected a text and where to write it: jaxspec say "..." --out hello.wav')
            return [self.text], [self.out]
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
        self.out_dir.mkdir(parents=True, exist_ok=True)
        return texts, [self.out_dir / f"{number:03d}.wav" for number in range(1, len(texts) + 1)]


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
    temperature: float = Settings.temperature
    """0 is greedy."""

    def run(self) -> None:
        """Compares."""
        from jaxspec.evaluate import compare, report

        base = Settings(draft_length=self.draft_length, temperature=self.temperature, matrix=self.matrix)
        plan = compare.Plan(self.sentences, self.seeds, self.betas, self.thresholds, base)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        result = compare.compare(plan)
        report.show(result["rows"])
        report.save(self.out_dir, result)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts quickly."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxspec"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main() -> None:
    """The entry point of the command ``jaxspec``; exits with 2 when the input is at fault."""
    commands = {"say": Say, "evaluate": Evaluate}
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
