"""Verifiers side by side on the held-out sentences: a row each, with error rates, speaker similarity, acceptance and speedup."""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import groups
from jaxspec.codec.builtin import codec
from jaxspec.codec.padding import decode_rows
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.evaluate import optimal, requirements
from jaxspec.evaluate.fidelity import fidelity
from jaxspec.evaluate.measures import Advance, References, Waves, measure, record_references, voice_of
from jaxspec.evaluate.plan import BUILTIN_DRAFT, Plan
from jaxspec.evaluate.precision import Precision, precision
from jaxspec.models import builtin as voices
from jaxspec.models.builtin import MAX_CODES, VOICES, Voice
from jaxspec.synthesis.builtin import synthesizer
from jaxspec.synthesis.contract import Settings, Synthesizer, target_of
from jaxspec.synthesis.decoding import PLAIN, Decoding, resolve
from jaxspec.synthesis.load import load
from jaxspec.synthesis.pipeline import SynthesisResult, Utterance, speak
from jaxspec.train.voice.corpus import SAMPLE_RATE_HZ

FIDELITY_SENTENCES, FIDELITY_ROUNDS = 8, 40
TIMED_SENTENCES = 16  # synthesised one at a time by each candidate, after one to warm up

Progress = Callable[[str, int, int], None]  # (what was done, utterances done, utterances in all)


class Candidate(NamedTuple):
    """What generates the utterances of one row."""

    settings: Settings
    synthesizer: Synthesizer
    decoding: Decoding


def compare(plan: Plan, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Synthesises and measures every row of a plan.

    Args:
        plan: what to compare.
        progress: called as utterances are timed, synthesised and recognised.

    Returns:
        {"rows": one dict a row, see ``measures.measure``, "texts", "sentences", "seeds", "draft", "weights", "recognizer", "jax",
        "python", "device"}, and with int8 weights the fields of ``precision.Precision``. Rows of a verifier also have
        "acceptance_rate", "tokens_per_round", "exact_match_rate", and the fields of ``fidelity.Fidelity``. Rows of the models
        have "speed_up": codes a second, relative to the row "autoregressive". Swapped rows have "group_size", the mean of all
        groups, and "swapped", the fraction of codes that changed.

    Raises:
        RuntimeError: flite or a package of the extra ``eval`` is missing, or Distill-MOS does not import; raised before any work.
        ValueError: the folder of the draft holds none, or one of another target; raised before any work.
    """
    requirements.check(plan.recognizer)
    sentences, voice = plan.chosen(), voices.load()
    if plan.weights == "int8":
        voice = voices.quantized(voice)
        base = synthesizer(voice)
    else:
        base = load(draft=None if plan.draft == BUILTIN_DRAFT else plan.draft)
    candidates, measured = _candidates(plan, base, voice), {}
    advance = _counter(plan, len(candidates), progress)
    speed_ups = _speed_ups(candidates, sentences, advance)  # first, before the recogniser and the encoder take memory
    references = record_references(sentences, plan.recognizer, advance)
    steps = _steps(base, sentences)
    rows = [measure("recordings", references.recordings, references, advance)]
    rows.append(measure("codec reconstruction", _reconstructions(references.recordings, voice, advance), references, advance))
    for name, candidate in candidates.items():
        row, utterances = _generated_row(name, candidate, references, plan.seeds, advance)
        rule = candidate.decoding.verify
        near = {} if rule is None else fidelity(rule, steps)._asdict()
        rows.append(row | {"speed_up": speed_ups[name]} | near)
        if name == PLAIN:
            rows += _swapped_rows(plan, base, utterances, references, advance)
            measured = _precision(voice, base, sentences, utterances)._asdict() if plan.weights == "int8" else {}
    asked = {"texts": plan.texts, "sentences": len(sentences), "seeds": plan.seeds, "draft": plan.draft, "weights": plan.weights}
    versions = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    return {"rows": rows, **asked, **measured, "recognizer": plan.recognizer, **versions}


def _precision(voice: Voice, base: Synthesizer, sentences: Sequence[str], utterances: Sequence[Utterance]) -> Precision:
    """The logits of the voice against those of the built-in one, on its utterances of sentences that are one piece."""
    pieces = [base.pieces(sentence) for sentence in sentences]
    whole = [i for i, some in enumerate(pieces) if len(some) == 1]
    names, codes = [voice_of(i) for i in whole], [np.asarray(utterances[i].codes) for i in whole]
    return precision(voices.load(), voice, [pieces[i][0] for i in whole], names, codes)


def _steps(base: Synthesizer, sentences: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """p and q of some steps, for the fidelity of each rule."""
    pieces = [piece for sentence in sentences[:FIDELITY_SENTENCES] for piece in base.pieces(sentence)]
    return list(optimal.steps(base, pieces, Settings(), FIDELITY_ROUNDS))


def _counter(plan: Plan, candidates: int, progress: Progress) -> Advance:
    """Adds up the utterances done. Each one counts once when it is timed or made, and once when it is measured."""
    made = 2 + len(plan.thresholds) + candidates * plan.seeds
    done, total = 0, candidates * (1 + TIMED_SENTENCES) + 2 * made * len(plan.chosen())

    def advance(what: str, count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return advance


def _candidates(plan: Plan, base: Synthesizer, voice: Voice) -> dict[str, Candidate]:
    candidates = {name: Candidate(settings, base, resolve(base, settings)) for name, settings in plan.settings().items()}
    without = base._replace(target=target_of(voice.target, None))  # the plain loop needs no features
    candidates[PLAIN] = candidates[PLAIN]._replace(synthesizer=without)
    return candidates


def _speed_ups(candidates: dict[str, Candidate], sentences: Sequence[str], advance: Advance) -> dict[str, float]:
    """Codes a second over those of autoregressive: the median over some sentences, each synthesised by all candidates in turn."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    timed = [sentences[index % len(sentences)] for index in range(TIMED_SENTENCES)]
    for seed, sentence in enumerate(["Warm up, please.", *timed]):
        for name, candidate in candidates.items():
            settings = dataclasses.replace(candidate.settings, seed=seed)
            result = speak([sentence], settings, candidate.synthesizer, candidate.decoding)
            if seed:
                rates[name].append(result.counts["tokens"] / result.seconds["lm"])
            advance("speedups", 1)
    return {name: float(np.median(np.divide(some, rates["autoregressive"]))) for name, some in rates.items()}


def _reconstructions(recordings: Waves, voice: Voice, advance: Advance) -> Waves:
    """The recordings, encoded and decoded by the codec."""
    model, span, waves = codec(voice.codec), voice.codec.samples_per_code, []
    assert model.encode is not None
    for index, wave in enumerate(recordings):
        padded = jnp.asarray(np.pad(wave, (0, -len(wave) % SAMPLE_RATE_HZ)))  # to whole seconds, so that few lengths are compiled
        codes = model.encode(voice.codec_params, padded[None], jnp.array([len(wave)], jnp.int32))
        row, condition = np.asarray(codes)[0, : -(-len(wave) // span)], voices.voice_index(voice_of(index))
        decoded = decode_rows(model, voice.codec_params, [row], np.array([condition], np.int32))
        waves.append(decoded[0][: len(wave)])
        advance("codec reconstruction", 1)
    return waves


def _generated_row(
    name: str, candidate: Candidate, references: References, seeds: int, advance: Advance
) -> tuple[dict[str, Any], list[Utterance]]:
    """The row of one candidate, and the utterances of its first seed."""
    utterances: list[Utterance] = []
    totals: list[dict[str, Any]] = []
    for seed in range(seeds):
        some, results = _synthesize(name, candidate, references.sentences, seed, advance)
        utterances += some
        totals += [result.counts for result in results]
    row = measure(name, [utterance.wave for utterance in utterances], references, advance)
    return row | _acceptance(totals), utterances[: len(references.sentences)]


def _synthesize(
    name: str, candidate: Candidate, sentences: Sequence[str], seed: int, advance: Advance
) -> tuple[list[Utterance], list[SynthesisResult]]:
    """Every sentence in its own voice: the utterances in order, and the result of each voice."""
    results = []
    for first, voice in enumerate(VOICES):
        settings, some = dataclasses.replace(candidate.settings, voice=voice, seed=seed), sentences[first :: len(VOICES)]
        results.append(speak(some, settings, candidate.synthesizer, candidate.decoding))
        advance(name, len(some))
    return [results[i % len(VOICES)].utterances[i // len(VOICES)] for i in range(len(sentences))], results


def _acceptance(totals: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rates over all drafted codes; none where nothing was drafted."""
    accepted, drafted, rounds, tokens = (sum(t[key] for t in totals) for key in ("accepted", "drafted", "rounds", "tokens"))
    exact = sum(t["exact_match_rate"] * t["accepted"] for t in totals)
    if not drafted:
        return {}
    return {
        "acceptance_rate": accepted / drafted,
        "tokens_per_round": tokens / rounds,
        "exact_match_rate": exact / accepted if accepted else 0.0,
    }


def _swapped_rows(
    plan: Plan, base: Synthesizer, utterances: Sequence[Utterance], references: References, advance: Advance
) -> list[dict[str, Any]]:
    """For each threshold, the utterances with every code replaced by a random member of one of its groups (PCG, Table 2)."""
    assert base.decode is not None
    rows = []
    for threshold in plan.thresholds:
        name, members, waves = f"swapped in group {threshold:g}", base.groups(threshold, plan.matrix), []
        swapped = total = 0
        for index, utterance in enumerate(utterances):
            count = len(utterance.codes)
            padded = jnp.asarray(np.pad(utterance.codes, (0, -count % MAX_CODES)))  # few lengths, so that few are compiled
            codes = np.asarray(groups.swap(jax.random.key(index), members, padded))[:count]
            swapped, total = swapped + int((codes != utterance.codes).sum()), total + count
            waves += base.decode([codes], Settings(voice=voice_of(index)), Stopwatch())
            advance(name, 1)
        sizes = {"group_size": float(np.asarray(members.sizes).mean()), "swapped": swapped / total}
        rows.append(measure(name, waves, references, advance) | sizes)
    return rows
