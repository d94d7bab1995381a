"""Verifiers side by side on the held-out sentences: word errors, likeness of the voice, acceptance and speed, a row each."""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec import groups
from jaxspec.codec.builtin import codec
from jaxspec.evaluate.recognize import error_rates, transcribe
from jaxspec.evaluate.similarity import embed, similarity
from jaxspec.models import builtin as voices
from jaxspec.models.builtin import MAX_CODES, VOICES, Voice
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.pipeline import SynthesisResult, Utterance, speak, verifier
from jaxspec.text import symbols
from jaxspec.text.held_out import held_out
from jaxspec.train.voice.corpus import SAMPLE_RATE_HZ, record
from jaxspec.types import Verify

Waves = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compare. Sentence i is spoken by voice i modulo the number of voices."""

    sentences: int = 200
    seeds: int = 3
    betas: tuple[float, ...] = (0.2, 0.4)
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.85)
    base: Settings = dataclasses.field(default_factory=Settings)

    def __post_init__(self) -> None:
        least, most = len(VOICES), len(held_out())
        if not least <= self.sentences <= most or self.seeds < 1:
            raise ValueError(f"expected {least} to {most} sentences and 1 seed or more, got {self.sentences} and {self.seeds}")

    def spoken(self) -> dict[str, Settings]:
        """The rows that the models speak, by name."""
        plain = dataclasses.replace(self.base, verify="autoregressive")
        rows = {"autoregressive": plain, "draft alone": plain, "exact": dataclasses.replace(self.base, verify="exact")}
        for beta in self.betas:
            rows[f"tolerance {beta:g}"] = dataclasses.replace(self.base, verify="tolerance", beta=beta)
        for threshold in self.thresholds:
            name = f"coarse-grained {threshold:g}"
            rows[name] = dataclasses.replace(self.base, verify="coarse-grained", threshold=threshold)
        return rows


def compare(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures every row; ``say`` is told of each as it is done.

    Returns:
        {"rows": one dict a row, "sentences", "seeds", "device", ...}; rates are fractions, speed-ups ratios to autoregressive.

    Raises:
        RuntimeError: flite is missing, which speaks the recordings that all else is compared with.
    """
    sentences, voice = held_out()[: plan.sentences], builtin()
    ways = _ways(plan, voice)
    speed_ups = _speed_ups(ways, sentences)  # first, before the recogniser and the rest are in memory
    say(f"codes a second, over autoregressive: {', '.join(f'{name} {ratio:.2f}x' for name, ratio in speed_ups.items())}")
    recordings = [record(symbols.normalize(s), _voice_of(i)).signal / np.float32(32768) for i, s in enumerate(sentences)]
    faces = {name: _face(recordings[i :: len(VOICES)]) for i, name in enumerate(VOICES)}
    rows = [_measures("recordings", sentences, recordings, recordings, faces)]
    rows.append(_measures("codec's copy", sentences, _copies(recordings, voices.load()), recordings, faces))
    say(f"{rows[0]['row']}: wer {rows[0]['wer']:.1%}; {rows[1]['row']}: wer {rows[1]['wer']:.1%}")
    for name, way in ways.items():
        row, plain = _spoken_row(name, way, sentences, recordings, faces, plan.seeds)
        rows.append(row | {"speed_up": speed_ups[name]})
        say(f"{name}: wer {row['wer']:.1%}, acceptance {row.get('acceptance_rate', 0.0):.1%}")
        if name == "autoregressive":
            for threshold in plan.thresholds:
                waves = _swapped(plain[0], voice, threshold, plan.base.matrix)
                rows.append(_measures(f"swapped {threshold:g}", sentences, waves, recordings, faces))
    versions = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    return {"rows": rows, "sentences": len(sentences), "seeds": plan.seeds, **versions}


def _voice_of(index: int) -> str:
    return VOICES[index % len(VOICES)]


def _face(waves: Waves) -> np.ndarray:
    """The mean embedding of a voice's recordings."""
    return embed(waves, SAMPLE_RATE_HZ).mean(0)


def _measures(
    name: str, sentences: Sequence[str], waves: Waves, recordings: Waves, faces: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Error rates, likeness to the own voice and to the most alike of the others, and length against the recordings.

    ``waves`` may hold several rounds of the sentences, one after the other; likeness is of the first.
    """
    rates = error_rates(sentences, transcribe(waves))
    first = [(wave, _voice_of(i)) for i, wave in enumerate(waves[: len(sentences)]) if len(wave) > SAMPLE_RATE_HZ // 2]
    heard = [(embed([wave], SAMPLE_RATE_HZ)[0], name) for wave, name in first]
    own = [similarity(one, faces[name]) for one, name in heard]
    other = [max(similarity(one, face) for n, face in faces.items() if n != name) for one, name in heard]
    return {
        "row": name,
        **rates._asdict(),
        "similarity": float(np.mean(own)),
        "similarity_to_others": float(np.mean(other)),
        "duration_ratio": sum(map(len, waves)) / sum(map(len, recordings)) * len(recordings) / len(waves),
    }


def _copies(recordings: Waves, voice: Voice) -> Waves:
    """The recordings through the codec and back."""
    copies = []
    for index, wave in enumerate(recordings):
        one = codec(voice.codec, voices.voice_index(_voice_of(index)))
        padded = np.pad(wave, (0, -len(wave) % SAMPLE_RATE_HZ))[None]  # few lengths, so that few are compiled
        copies.append(np.asarray(one.decode(voice.codec_params, one.encode(voice.codec_params, padded)))[0, : len(wave)])
    return copies


class _Way(NamedTuple):
    """How a row speaks."""

    settings: Settings
    synthesizer: Synthesizer
    rule: Verify


def _ways(plan: Plan, voice: Synthesizer) -> dict[str, _Way]:
    alone = voice._replace(target=voice.draft, target_params=voice.draft_params)
    return {
        name: _Way(settings, alone if name == "draft alone" else voice, verifier(voice, settings))
        for name, settings in plan.spoken().items()
    }


def _speak_all(way: _Way, sentences: Sequence[str], seed: int) -> tuple[list[Utterance], list[SynthesisResult]]:
    """Every sentence by its voice: the speeches in order, and what each voice's batch came to."""
    parts = [
        speak(sentences[i :: len(VOICES)], dataclasses.replace(way.settings, voice=name, seed=seed), way.synthesizer, way.rule)
        for i, name in enumerate(VOICES)
    ]
    return [parts[i % len(VOICES)].utterances[i // len(VOICES)] for i in range(len(sentences))], parts


def _spoken_row(
    name: str,
    way: _Way,
    sentences: list[str],
    recordings: Waves,
    faces: dict[str, np.ndarray],
    seeds: int,
) -> tuple[dict[str, Any], list[list[Utterance]]]:
    utterances, totals = [], []
    for seed in range(seeds):
        some, parts = _speak_all(way, sentences, seed)
        utterances.append(some)
        totals += [part.counts for part in parts]
    waves = [utterance.wave for some in utterances for utterance in some]
    row = _measures(name, sentences, waves, recordings, faces)
    accepted, drafted, rounds, tokens = (sum(t[key] for t in totals) for key in ("accepted", "drafted", "rounds", "tokens"))
    exact = sum(t["exact_match_rate"] * t["accepted"] for t in totals)
    if drafted:
        row |= {
            "acceptance_rate": accepted / drafted,
            "tokens_per_round": tokens / rounds,
            "exact_match_rate": exact / accepted if accepted else 0.0,
        }
    return row, utterances


def _swapped(utterances: list[Utterance], voice: Synthesizer, threshold: float, matrix: str) -> Waves:
    """The same codes, each replaced by a random member of a random one of its groups (PCG, Table 2)."""
    members, waves = voice.groups(threshold, matrix), []
    for index, utterance in enumerate(utterances):
        padded = np.pad(utterance.codes, (0, MAX_CODES - len(utterance.codes)))  # one length, so that one is compiled
        other = np.asarray(groups.swap(jax.random.key(index), members, padded))[: len(utterance.codes)]
        waves += voice.decode([other], Settings(voice=_voice_of(index)))
    return waves


def _speed_ups(ways: dict[str, _Way], sentences: Sequence[str]) -> dict[str, float]:
    """Codes a second of each row over those of autoregressive, the median over some sentences, on which the rows take turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn, sentence in enumerate(["Warm up, please.", *sentences[:16]]):
        for name, way in ways.items():
            spoken = speak([sentence], dataclasses.replace(way.settings, seed=turn), way.synthesizer, way.rule)
            if turn:
                rates[name].append(spoken.counts["tokens"] / spoken.seconds["lm"])
    return {name: float(np.median(np.divide(some, rates["autoregressive"]))) for name, some in rates.items()}
