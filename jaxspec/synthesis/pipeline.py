"""The whole way of the data on one page: text -> prompts -> [draft, score, verify, commit]* -> codes -> waves."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import verify
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.draft import model_draft
from jaxspec.speculate import autoregressive, generate
from jaxspec.state import NON_FINITE, Generation
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.types import Verify


class Utterance(NamedTuple):
    """One text spoken. ``origin`` tells of each code whether it was accepted, a correction or a bonus, see ``jaxspec.state``."""

    wave: np.ndarray  # float32 [N], -1 .. 1; empty where codes are all that comes out
    codes: np.ndarray  # int32 [T], or [T Q] where a frame has Q codes
    origin: np.ndarray  # int8, as the codes
    sample_rate_hz: int


class SynthesisResult(NamedTuple):
    """The speech of a list of texts, and what it took: counts summed over all codes, and seconds by part."""

    utterances: list[Utterance]
    counts: dict[str, object]
    seconds: dict[str, float]


def speak(
    texts: Sequence[str],
    settings: Settings | None = None,
    synthesizer: Synthesizer | None = None,
    rule: Verify | None = None,
    autotuner: Autotuner | None = None,
) -> SynthesisResult:
    """Speaks each text: long ones are cut into pieces, all pieces go through the models in batches, and are joined again.

    The same texts, settings and seed give the same samples. ``synthesizer`` is by default the built-in voice. ``rule`` is what
    ``verifier`` makes of the settings; who speaks often makes it once, and for "auto" keeps what it learns in ``autotuner``.

    Raises:
        ValueError: a text is empty or cannot be spoken, or the weights give laws that are not finite.
    """
    settings, synthesizer = settings or Settings(), synthesizer or builtin()
    pieces = [synthesizer.pieces(one) for one in texts]
    flat = list(itertools.chain.from_iterable(pieces))
    name, rule = synthesizer.rule(settings), rule or verifier(synthesizer, settings)
    keys = jax.random.split(jax.random.key(settings.seed), len(flat))
    watch, autotuner = Stopwatch(), autotuner or Autotuner(("coarse-grained", "autoregressive") if name == "auto" else (name,))
    spoken, generations = [], []
    for first in range(0, len(flat), synthesizer.max_batch):
        some = slice(first, first + synthesizer.max_batch)
        batch, began = _batch(len(flat[some])), watch.seconds.get("lm", 0.0)
        candidate = autotuner.choose(batch)
        with watch("lm"):
            generation = tokens_of(flat[some], keys[some], synthesizer, dataclasses.replace(settings, verify=candidate), rule)
        autotuner.record(batch, candidate, generation.length.sum(), watch.seconds["lm"] - began)
        with watch("codec"):
            spoken += decode(generation, synthesizer, settings)
        generations.append(generation)
    each = iter(spoken)
    joined = [_join(list(itertools.islice(each, len(some)))) for some in pieces]
    return SynthesisResult(joined, count(generations, name, settings.seed), watch.seconds)


def verifier(synthesizer: Synthesizer, settings: Settings) -> Verify:
    """The rule of acceptance that the settings name."""
    name = synthesizer.rule(settings)
    if name == "tolerance":
        return verify.tolerance(settings.beta)
    if name in ("coarse-grained", "auto"):
        threshold = synthesizer.threshold if settings.threshold is None else settings.threshold
        return verify.coarse_grained(synthesizer.groups(threshold, settings.matrix))
    return verify.exact()


def tokens_of(pieces: Sequence[str], keys: jax.Array, synthesizer: Synthesizer, settings: Settings, rule: Verify) -> Generation:
    """Pieces of text to tokens, in one batch, on the host. ``keys`` has one key for each."""
    batch = _batch(len(pieces))
    filled = [*pieces, *pieces[:1] * (batch - len(pieces))]  # the rows that fill the batch up say nothing
    asked = synthesizer.requests(filled, settings)
    limit = np.where(np.arange(batch) < len(pieces), asked.limit, 0)
    keys = keys[np.arange(batch) % len(pieces)]
    shared = {"max_new_tokens": asked.capacity, "limit": limit, "stop_ids": synthesizer.stop_ids, "sampling": asked.sampling}
    if synthesizer.rule(settings) != "autoregressive":
        draft = model_draft(synthesizer.draft, settings.draft_length)
        models = (synthesizer.target, synthesizer.target_params, draft, synthesizer.draft_params)
        generation = generate(keys, *models, rule, asked.prompts, asked.length, **shared)
    else:
        generation = autoregressive(keys, synthesizer.target, synthesizer.target_params, asked.prompts, asked.length, **shared)
    generation = jax.tree.map(lambda array: np.asarray(array)[: len(pieces)], generation)
    if (generation.info.stop_reason == NON_FINITE).any():
        raise ValueError("expected finite logits from the model, but some are NaN or infinite: its weights are damaged")
    return generation


def _batch(count: int) -> int:
    """The size of the batch that so many pieces go in: there are few, so that few are compiled."""
    return 1 << (count - 1).bit_length()


def decode(generation: Generation, synthesizer: Synthesizer, settings: Settings) -> list[Utterance]:
    """A batch of tokens to waves; stop ids and what else is no code are dropped."""
    found = [synthesizer.codes(row[:n]) for row, n in zip(generation.tokens, generation.length, strict=True)]
    codes = [row for row, _ in found]
    origins = [origin[at] for origin, (_, at) in zip(generation.info.origin, found, strict=True)]
    waves = synthesizer.decode(codes, settings) if synthesizer.decode else [np.zeros(0, np.float32)] * len(codes)
    waves = [np.clip(wave, -1, 1) for wave in waves]
    return [Utterance(*parts, synthesizer.sample_rate_hz) for parts in zip(waves, codes, origins, strict=True)]


def _join(utterances: list[Utterance]) -> Utterance:
    wave, codes, origin, rates = zip(*utterances, strict=True)
    return Utterance(np.concatenate(wave), np.concatenate(codes), np.concatenate(origin), rates[0])


def count(generations: Sequence[Generation], rule: str, seed: int) -> dict[str, object]:
    """The counts of some batches together, under the names of the field; see ``jaxspec.state.Info``."""
    infos = [generation.info for generation in generations]
    tokens = sum(int(generation.length.sum()) for generation in generations)
    rounds, drafted, accepted, exact = (
        sum(int(getattr(info, name).sum()) for info in infos) for name in ("rounds", "drafted", "accepted", "exact_matches")
    )
    drafting = [info for info in infos if info.accepted_per_position.shape[1]] or infos  # "auto" may have batches without
    positions = sum(info.accepted_per_position.sum(0) for info in drafting)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_round": tokens / max(rounds, 1),
        "accepted_per_position": [float(n) / max(rounds, 1) for n in positions],
        "exact_match_rate": exact / accepted if accepted else 0.0,
        "verify": rule,
        "seed": seed,
    }
