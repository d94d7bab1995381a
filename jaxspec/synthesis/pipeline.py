"""The whole pipeline on one page: text -> prompts -> [draft, score, verify, commit]* -> codes -> waves."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.common.stopwatch import Stopwatch
from jaxspec.state import Generation
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.decoding import Decoding, batch_size, resolve, tokens_of


class Utterance(NamedTuple):
    """One spoken text. ``origin`` says of each code whether it was accepted, a correction or a bonus, see ``jaxspec.state``."""

    wave: np.ndarray  # float32 [N], -1 .. 1; empty where there is no codec
    codes: np.ndarray  # int32 [T], or [T Q] where a frame has Q codes
    origin: np.ndarray  # int8, as the codes
    sample_rate_hz: int


class SynthesisResult(NamedTuple):
    """The speech of a list of texts, and what it took: counts summed over all codes, and seconds by part."""

    utterances: list[Utterance]
    counts: dict[str, Any]
    seconds: dict[str, float]


def speak(
    texts: Sequence[str],
    settings: Settings | None = None,
    synthesizer: Synthesizer | None = None,
    decoding: Decoding | None = None,
    autotuner: Autotuner | None = None,
) -> SynthesisResult:
    """Speaks each text: long ones are cut into pieces, all pieces go through the models in batches, and are joined again.

    The same texts, settings and seed give the same samples. ``synthesizer`` is by default the built-in voice. Callers that speak
    often make ``decoding`` once, with ``resolve``, and for "auto" keep an ``autotuner``.

    Raises:
        ValueError: a text is empty or cannot be spoken, or the model's logits are not finite.
    """
    settings, synthesizer = settings or Settings(), synthesizer or builtin()
    pieces = [synthesizer.pieces(one) for one in texts]
    flat = list(itertools.chain.from_iterable(pieces))
    decoding = decoding or resolve(synthesizer, settings)
    keys = jax.random.split(settings.key(), len(flat))
    candidates = {"autoregressive": decoding.plain(), "coarse-grained": decoding} if decoding.name == "auto" else {"": decoding}
    watch, autotuner = Stopwatch(), autotuner or Autotuner(tuple(candidates))
    spoken, generations = [], []
    for first in range(0, len(flat), synthesizer.max_batch):
        some = slice(first, first + synthesizer.max_batch)
        batch, began = batch_size(len(flat[some])), watch.seconds.get("lm", 0.0)
        candidate = autotuner.choose(batch)
        with watch("lm"):
            generation = tokens_of(flat[some], keys[some], synthesizer, settings, candidates[candidate])
        autotuner.record(batch, candidate, generation.length.sum(), watch.seconds["lm"] - began)
        with watch("codec"):
            spoken += decode(generation, synthesizer, settings)
        generations.append(generation)
    each = iter(spoken)
    joined = [_join(list(itertools.islice(each, len(some)))) for some in pieces]
    return SynthesisResult(joined, count(generations, decoding.name, settings.seed), watch.seconds)


def decode(generation: Generation, synthesizer: Synthesizer, settings: Settings) -> list[Utterance]:
    """A batch of tokens to waves; stop ids and whatever else is no code are dropped."""
    found = [synthesizer.codes(row[:n]) for row, n in zip(generation.tokens, generation.length, strict=True)]
    codes = [row for row, _ in found]
    origins = [origin[at] for origin, (_, at) in zip(generation.info.origin, found, strict=True)]
    waves = synthesizer.decode(codes, settings) if synthesizer.decode else [np.zeros(0, np.float32)] * len(codes)
    waves = [np.clip(wave, -1, 1) for wave in waves]
    return [Utterance(*parts, synthesizer.sample_rate_hz) for parts in zip(waves, codes, origins, strict=True)]


def _join(utterances: list[Utterance]) -> Utterance:
    wave, codes, origin, rates = zip(*utterances, strict=True)
    return Utterance(np.concatenate(wave), np.concatenate(codes), np.concatenate(origin), rates[0])


def count(generations: Sequence[Generation], name: str, seed: int) -> dict[str, object]:
    """The counts of some batches together, under the names of the field; see ``jaxspec.state.Info``.

    ``accepted_per_position`` is over the rounds that drafted, as "auto" may have batches without a draft.
    """
    infos = [generation.info for generation in generations]
    tokens = sum(int(generation.length.sum()) for generation in generations)
    rounds, drafted, accepted, exact = (
        sum(int(getattr(info, name).sum()) for info in infos) for name in ("rounds", "drafted", "accepted", "exact_matches")
    )
    drafting = [info for info in infos if info.accepted_per_position.shape[1]]
    positions = sum((info.accepted_per_position.sum(0) for info in drafting), np.zeros(0, int) if not drafting else 0)
    drafting_rounds = sum(int(info.rounds.sum()) for info in drafting)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_round": tokens / max(rounds, 1),
        "accepted_per_position": [float(n) / max(drafting_rounds, 1) for n in positions],
        "exact_match_rate": exact / accepted if accepted else 0.0,
        "verify": name,
        "seed": int(seed),
    }
