"""The target's own speech from texts: batches of pieces, sampled as in deployment and written as shards of samples."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from blake3 import blake3

from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.pretrained import Pretrained
from jaxspec.codec.padding import padded_batch
from jaxspec.common import hosts
from jaxspec.models.builtin import VOICES
from jaxspec.sampling import Sampling
from jaxspec.state import STOP_TOKEN
from jaxspec.synthesis import converted
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Requests, Settings, Synthesizer
from jaxspec.synthesis.decoding import PLAIN, Decoding, generation_of
from jaxspec.synthesis.load import builtin_target
from jaxspec.train import samples as samples_lib
from jaxspec.train.samples import Samples

BUILTIN = "builtin"


class Target(NamedTuple):
    """A target as drafts are trained for it: its weights and shape, its prompts, and its voices, None for one without names."""

    pretrained: Pretrained
    synthesizer: Synthesizer
    voices: tuple[str | None, ...]

    @property
    def sampling(self) -> Sampling:
        """How it is sampled by default."""
        return self.pretrained.model.sampling


def load_target(name: str, dtype: str | None = None) -> Target:
    """The built-in voice ("builtin") or a converted model.

    Args:
        name: "builtin", or a folder that ``jaxspec convert`` made.
        dtype: to compute in; by default float32 on a CPU and the checkpoint's elsewhere. The built-in voice is float32.

    Raises:
        ValueError: the folder holds no language model, or one without a tokenizer.
    """
    if name == BUILTIN:
        synthesizer = builtin()
        return Target(builtin_target(synthesizer.target_params), synthesizer, VOICES)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else None)
    target = pretrained.load(name, dtype)
    return Target(target, converted.synthesizer(target), target.model.voices[:1] or (None,))


@dataclasses.dataclass(frozen=True)
class Speech:
    """What to sample: pieces of texts in batches, which take the voices in turn."""

    texts: tuple[str, ...]
    settings: Settings
    voices: tuple[str | None, ...]
    batch: int

    def pieces(self, synthesizer: Synthesizer) -> list[str]:
        """The pieces of all texts.

        Raises:
            ValueError: a text has nothing to speak; the message names it.
        """
        return [piece for text in self.texts for piece in synthesizer.pieces(text)]

    def description(self, target: Target) -> dict[str, Any]:
        """What ``samples.json`` says: the target, the sampling, the texts, the seed and the vocabulary."""
        model, sampling = target.pretrained.model, self.settings.sampling(target.sampling)
        return {
            "target": model.digest,
            "vocabulary": model.shape.vocab,
            "sampling": dataclasses.asdict(sampling),
            "max_codes": self.settings.max_codes,
            "seed": self.settings.seed,
            "batch": self.batch,
            "voices": list(self.voices),
            "texts": f"blake3:{blake3(json.dumps(self.texts).encode()).hexdigest()}",
        }


class Sampled(NamedTuple):
    """How many pieces were sampled, how many of them ended, and the tokens of these."""

    pieces: int
    finished: int
    tokens: int


def sample(
    folder: Path, speech: Speech, target: Target, progress: Callable[[int, int], None] = lambda done, total: None
) -> Sampled:
    """Samples every batch whose shard does not exist yet; only rows that end with a stop id are kept.

    The same arguments give the same shards, wherever a run was interrupted.

    Args:
        folder: of the shards; made unless it exists.
        speech: what to sample.
        target: the model.
        progress: called with the number of pieces done and of all pieces.

    Returns:
        What the folder holds.

    Raises:
        ValueError: a text cannot be spoken, no row ended, or the folder holds other samples.
        OSError: the folder cannot be written.
    """
    pieces = speech.pieces(target.synthesizer)
    samples_lib.claim(folder, speech.description(target))
    finished = tokens = 0
    for index, first in enumerate(range(0, len(pieces), speech.batch)):
        path = samples_lib.shard_path(folder, index)
        if not hosts.from_first(path.exists):
            samples_lib.write_shard(path, _batch(pieces[first : first + speech.batch], index, speech, target))
            hosts.wait(str(path))
        shard = samples_lib.read_shard(path)
        finished, tokens = finished + len(shard.texts), tokens + len(shard.tokens)
        progress(min(first + speech.batch, len(pieces)), len(pieces))
    if not finished:
        raise ValueError(f"expected speech that ends with a stop id, got none in {len(pieces)} pieces: raise --max-codes")
    return Sampled(len(pieces), finished, tokens)


def _batch(pieces: Sequence[str], index: int, speech: Speech, target: Target) -> Samples:
    """One batch: prompts and emitted tokens, with the stop id, of the rows that ended. A short batch is padded."""
    size, synthesizer = padded_batch(speech.batch), target.synthesizer
    settings = dataclasses.replace(speech.settings, voice=speech.voices[index % len(speech.voices)])
    requests = synthesizer.requests([*pieces, *[pieces[0]] * (size - len(pieces))], settings)
    keys = jax.random.split(jax.random.fold_in(settings.key(), np.uint32(index)), size)
    generation = generation_of(requests, len(pieces), keys, synthesizer, Decoding(PLAIN))
    ended = [i for i in range(len(pieces)) if generation.info.stop_reason[i] == STOP_TOKEN]
    rows = [np.concatenate([_prompt(requests, i), generation.tokens[i, : generation.length[i]]]) for i in ended]
    return samples_lib.of_rows(rows, requests.prompt_length[ended], [pieces[i] for i in ended])


def _prompt(requests: Requests, i: int) -> np.ndarray:
    return np.asarray(requests.prompt[i, : requests.prompt_length[i]], np.int32)


def read(folder: Path, target: Target) -> Samples:
    """The samples of a folder, checked against the target, with prompts put before rows of codes alone.

    Raises:
        ValueError: the samples are of another target, or have ids that this one lacks.
    """
    model = target.pretrained.model
    made = samples_lib.read_description(folder)
    if made is not None and made.get("target") != model.digest:
        raise ValueError(
            f"expected samples of the target {model.digest}, got those of {made.get('target')} in {folder}: sample this target"
        )
    samples = samples_lib.read(folder)
    samples_lib.check(samples, model, folder)
    return samples if samples.prompt_length is not None else _with_prompts(samples, target)


def _with_prompts(samples: Samples, target: Target) -> Samples:
    """Rows of codes with the target's prompts before them, in its voices in turn, and a stop id after them."""
    model, rows, lengths = target.pretrained.model, [], []
    for i, text in enumerate(samples.texts):
        requests = target.synthesizer.requests([text], Settings(voice=target.voices[i % len(target.voices)]))
        prompt, codes = _prompt(requests, 0), samples.row(i)
        slot = np.arange(len(codes), dtype=np.int32) % model.slots
        rows.append(np.concatenate([prompt, model.codes_first + slot * model.num_codes + codes, model.stop_ids[:1]]))
        lengths.append(len(prompt))
    return samples_lib.of_rows(rows, lengths, samples.texts)


def sampling_of(folder: Path, target: Target) -> Sampling:
    """How the samples of a folder were sampled; the target's default where the folder does not say."""
    made = samples_lib.read_description(folder) or {}
    return Sampling(**made["sampling"]) if "sampling" in made else target.sampling


def texts_of(lines: dict[int, str], synthesizer: Synthesizer) -> Iterator[str]:
    """The texts of a file's lines.

    Raises:
        ValueError: a line cannot be spoken; the message has its number.
    """
    for number, line in lines.items():
        try:
            synthesizer.pieces(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield line
