"""The command `encode`: recordings to codes, for training drafts and for references."""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from jaxspec.audio import files
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.checkpoint.descriptions import CodecDescription
from jaxspec.commands import outputs
from jaxspec.commands.console import progress_bar, report
from jaxspec.commands.inputs import read_lines
from jaxspec.common.files import claim, replacing
from jaxspec.synthesis.recording import encode
from jaxspec.train import samples

LONGEST_S = 60  # of a recording; the attention of encoders spans it all


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encodes recordings: the codes of NAME.wav go to NAME.npy. Run it again to resume."""

    codec: tyro.conf.Positional[Path]
    """A codec that `jaxspec convert` made with its encoder."""
    recordings: tyro.conf.Positional[tuple[Path, ...]]
    """Sound files (.wav, .flac, .mp3, .ogg), and folders of them."""
    out: Path = dataclasses.field(kw_only=True)
    """The folder of the codes."""
    texts: Path | None = None
    """What the recordings say: NAME|TEXT on each line, or NAME, a tab and TEXT. Then a shard of codes with texts is written too,
    which `jaxspec train-draft --data` takes."""
    batch: int = 4
    """Recordings that are encoded together."""
    json: bool = False
    """Print one JSON object on standard output, and the text on standard error."""

    def run(self) -> None:
        """Encodes."""
        named = recordings_of(self.recordings)
        texts = transcripts(self.texts, named) if self.texts else {}
        if self.batch < 1:
            raise ValueError(f"expected a batch of 1 or more, got {self.batch}: leave it out for 4")
        digest = descriptions.read_as(self.codec, CodecDescription).digest
        outputs.make_folder(self.out)
        claim(self.out / "codec.json", {"codec": digest}, "use the codec that the folder was begun with, or another folder")
        codec = pretrained.load_codec(self.codec)
        if codec.codec.encode is None:
            raise ValueError(f"expected a codec with its encoder, got {self.codec}: convert it without --without-encoder")
        todo = sorted((name for name in named if not self._codes(name).exists()), key=lambda name: named[name].stat().st_size)
        failed: dict[str, str] = {}
        with progress_bar("encoding") as progress:
            for first in range(0, len(todo), self.batch):
                read = readable({name: named[name] for name in todo[first : first + self.batch]}, failed)
                for name, codes in zip(read, encode(codec, list(read.values())) if read else (), strict=True):
                    self._write(name, codes)
                progress(first + self.batch, len(todo))
        done = [name for name in named if name not in failed]
        if texts and done:
            self._write_shard(done, texts)
        result = {"folder": str(self.out), "recordings": len(done), "failed": failed}
        report(f"{len(done)} of {len(named)} recordings encoded in {self.out}", result, self.json)
        if failed:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
            raise ValueError(f"expected recordings of speech, got {len(failed)} of {len(named)} that are none:{reasons}")

    def _codes(self, name: str) -> Path:
        return self.out / f"{name}.npy"

    def _write(self, name: str, codes: np.ndarray) -> None:
        with replacing(self._codes(name)) as partial, partial.open("wb") as file:
            np.save(file, codes)

    def _write_shard(self, names: list[str], texts: dict[str, str]) -> None:
        rows = [np.load(self._codes(name), allow_pickle=False).reshape(-1) for name in names]
        samples.write_shard(samples.shard_path(self.out, 0), samples.of_rows(rows, None, [texts[name] for name in names]))


def recordings_of(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Sound files by name, those of folders included, sorted within each.

    Raises:
        ValueError: there is none, one is missing, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in outputs.SOUND) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise ValueError(f"expected sound files ({', '.join(outputs.SOUND)}), got {path}: give files or a folder of them")
        for one in inside:
            if found.setdefault(one.stem, one) != one:
                raise ValueError(f"expected one recording for each name, got {found[one.stem]} and {one}: rename one")
    return found


def readable(named: dict[str, Path], failed: dict[str, str]) -> dict[str, tuple[np.ndarray, int]]:
    """The recordings that can be read; ``failed`` gets the reasons of the others."""
    read = {}
    for name, path in named.items():
        try:
            read[name] = recording(path)
        except ValueError as error:
            failed[name] = str(error)
    return read


def recording(path: Path) -> tuple[np.ndarray, int]:
    """The wave float32 [N] of a sound file and its rate in Hz.

    Raises:
        ValueError: the file is no recording, or is too long.
    """
    wave, rate = files.read(path)
    if len(wave) > LONGEST_S * rate:
        raise ValueError(f"expected at most {LONGEST_S} s, got {len(wave) / rate:.0f} s in {path}: cut it")
    return wave, rate


def transcripts(path: Path, names: dict[str, Path]) -> dict[str, str]:
    """The text of each recording, from lines of NAME|TEXT or NAME, a tab and TEXT; a middle field is left out.

    Raises:
        ValueError: a line has no text, or a recording has no line.
    """
    found = {}
    for number, line in read_lines(path).items():
        parts = line.split("\t" if "\t" in line else "|")
        if len(parts) < 2 or not parts[-1].strip():
            raise ValueError(f"expected NAME|TEXT on line {number} of {path}, got {line!r}: correct it")
        name = parts[0].strip()
        found[Path(name).stem if Path(name).suffix.lower() in outputs.SOUND else name] = parts[-1].strip()
    if missing := sorted(names.keys() - found.keys()):
        raise ValueError(f"expected a line of {path} for each recording, got none for {missing[0]}: add it")
    return found
