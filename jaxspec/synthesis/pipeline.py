"""The whole pipeline on one page: text -> prompts -> [draft, score, verify, commit]* -> codes -> waves."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.codec.padding import padded_batch
from jaxspec.common.compilation_cache import keep
from jaxspec.common.stopwatch import Stopwatch
from jaxspec.state import Generation
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.synthesis.decoding import PLAIN, Decoding, resolve, tokens_of

AUTO = (PLAIN, "coarse-grained")  # what "auto" chooses from; a single batch is autoregressive


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


class Tally:
    """What the batches of a synthesis took: seconds by part, and counts."""

    def __init__(self) -> None:
        self.watch = Stopwatch("lm")
        self.generations: list[Generation] = []

    def counts(self, name: str, seed: int) -> dict[str, Any]:
        """The counts of all batches, see ``count``."""
        return count(self.generations, name, seed)


def speak(
    texts: str | Sequence[str],
    settings: Settings | None = None,
    synthesizer: Synthesizer | None = None,
    decoding: Decoding | None = None,
    autotuner: Autotuner[str] | None = None,
) -> SynthesisResult:
    """Speaks each text: long ones are cut into pieces, all pieces go through the models in batches, and are joined again.

    The same texts, settings and seed give the same samples.

    Args:
        texts: one text, or some.
        settings: how to synthesize.
        synthesizer: by default the built-in voice.
        decoding: what ``resolve`` makes of the settings; callers that speak often make it once.
        autotuner: what "auto" learned in earlier calls.

    Returns:
        An utterance for each text, counts and seconds.

    Raises:
        ValueError: a text is empty or cannot be spoken, or the model's logits are not finite.
    """
    settings, synthesizer = settings or Settings(), synthesizer or builtin()
    decoding, tally = decoding or resolve(synthesizer, settings), Tally()
    texts, utterances = [texts] if isinstance(texts, str) else texts, []
    for _, utterance in speak_each(texts, settings, synthesizer, decoding, tally, autotuner):
        if isinstance(utterance, ValueError):
            raise utterance
        utterances.append(utterance)
    return SynthesisResult(utterances, tally.counts(decoding.name, settings.seed), tally.watch.seconds)


def speak_each(
    texts: Sequence[str],
    settings: Settings,
    synthesizer: Synthesizer,
    decoding: Decoding,
    tally: Tally,
    autotuner: Autotuner[str] | None = None,
    skip: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, Utterance | ValueError]]:
    """Speaks texts in batches and yields each as soon as it is done, after those that cannot be spoken.

    Args:
        texts: any number of them.
        settings: how to synthesize.
        synthesizer: the model and its codec.
        decoding: what ``resolve`` makes of the settings.
        tally: to which times and counts are added.
        autotuner: what "auto" learned in earlier calls.
        skip: indices of texts not to speak; the others have the samples that they have with these.
        progress: called with the number of pieces that are done, and of all.

    Yields:
        (index of a text, its utterance, or why it cannot be spoken).
    """
    pieces = [_pieces(text, settings, synthesizer) for text in texts]
    yield from ((i, some) for i, some in enumerate(pieces) if isinstance(some, ValueError) and i not in skip)
    numbered = enumerate((i, piece) for i, some in enumerate(pieces) if not isinstance(some, ValueError) for piece in some)
    queue = [(number, i, piece) for number, (i, piece) in numbered if i not in skip]
    candidates = {PLAIN: Decoding(PLAIN), AUTO[1]: decoding} if decoding.name == "auto" else {decoding.name: decoding}
    autotuner, key, waiting = autotuner or Autotuner(tuple(candidates)), settings.key(), {}
    for first in range(0, len(queue), synthesizer.max_batch):
        numbers, owners, batch = zip(*queue[first : first + synthesizer.max_batch], strict=True)
        candidate, began = autotuner.choose(padded_batch(len(batch))), tally.watch.seconds["lm"]
        with tally.watch("lm"):
            keys = row_keys(key, np.resize(np.array(numbers, np.uint32), padded_batch(len(batch))))
            generation = tokens_of(batch, keys, synthesizer, settings, candidates[candidate])
        tally.generations.append(generation)
        autotuner.record(padded_batch(len(batch)), candidate, int(generation.length.sum()), tally.watch.seconds["lm"] - began)
        spoken = decode(generation, synthesizer, settings, tally.watch)
        progress(first + len(batch), len(queue))
        for i, utterance in zip(owners, spoken, strict=True):
            waiting.setdefault(i, []).append(utterance)
            if len(waiting[i]) == len(pieces[i]):
                yield i, _join(waiting.pop(i))


def _pieces(text: str, settings: Settings, synthesizer: Synthesizer) -> list[str] | ValueError:
    """The pieces of a text whose prompts can be made, or why they cannot."""
    try:
        pieces = synthesizer.pieces(text)
        synthesizer.requests(pieces, settings)
    except ValueError as error:
        return error
    return pieces


# (key, numbers uint32 [B]) -> keys [B]: the key of each piece depends on its number among all pieces.
row_keys = keep(jax.jit(jax.vmap(jax.random.fold_in, (None, 0))), "fold_in")


def decode(generation: Generation, synthesizer: Synthesizer, settings: Settings, watch: Stopwatch) -> list[Utterance]:
    """A batch of tokens to waves, timed by stage; stop ids and whatever else is no code are dropped."""
    found = [synthesizer.codes(row[:n]) for row, n in zip(generation.tokens, generation.length, strict=True)]
    codes = [row for row, _ in found]
    origins = [origin[at] for origin, (_, at) in zip(generation.info.origin, found, strict=True)]
    waves = synthesizer.decode(codes, settings, watch) if synthesizer.decode else [np.zeros(0, np.float32)] * len(codes)
    waves = [np.clip(wave, -1, 1) for wave in waves]
    return [Utterance(*parts, synthesizer.sample_rate_hz) for parts in zip(waves, codes, origins, strict=True)]


def _join(utterances: list[Utterance]) -> Utterance:
    wave, codes, origin, rates = zip(*utterances, strict=True)
    return Utterance(np.concatenate(wave), np.concatenate(codes), np.concatenate(origin), rates[0])


def count(generations: Sequence[Generation], name: str, seed: int) -> dict[str, object]:
    """The counts of some batches together, under the names of the field; see ``jaxspec.state.Info``.

    ``accepted_per_position`` is the share of the drafting rounds that accepted each position: "auto" has batches without a draft.
    """
    infos = [generation.info for generation in generations]
    tokens = sum(int(generation.length.sum()) for generation in generations)
    rounds, drafted, accepted, exact = (
        sum(int(getattr(info, name).sum()) for info in infos) for name in ("rounds", "drafted", "accepted", "exact_matches")
    )
    drafting = [info for info in infos if info.accepted_per_position.shape[1]]
    drafting_rounds = sum(int(info.rounds.sum()) for info in drafting)
    positions = itertools.zip_longest(*(info.accepted_per_position.sum(0) for info in drafting), fillvalue=0)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_round": tokens / max(rounds, 1),
        "accepted_per_position": [int(sum(counts)) / max(drafting_rounds, 1) for counts in positions],
        "exact_match_rate": exact / accepted if accepted else 0.0,
        "verify": name,
        "seed": int(seed),
    }
