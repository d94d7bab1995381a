"""Trains the target and the first stage of the draft: codes from text, with a hand on where the model looks.

Two things make a small model learn fast. The rows of the code tables are sums of learnt parts, one for each digit of a code and
one for each pair of digits, so that codes which sound alike share what is learnt of them; the sums are written out when training
ends. And one attention head in a few layers is told which symbol is being spoken (flite knows), so that the text is read
in order.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.codec import fsq
from jaxspec.models import transformer
from jaxspec.models.builtin import CODES, LEVELS, STOP, prompt
from jaxspec.text.symbols import to_symbols
from jaxspec.train.loop import Loss
from jaxspec.train.voice.alignment import align
from jaxspec.train.voice.corpus import Recording, read_shard
from jaxspec.types import Array, Params

IGNORE = -1


class Batch(NamedTuple):
    """Rows to learn from, each int32 [B S]: ids, the code that follows each, the position to look at; IGNORE for none."""

    tokens: np.ndarray
    target: np.ndarray
    look: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """How texts and codes are shown in training."""

    spell: float = 0.08  # the share of known words given in letters
    disturb: float = 0.06  # the share of input codes moved by one level in one digit
    buckets: tuple[int, ...] = (80, 104, 128, 160, 224)
    tokens: int = 2048  # in one batch


def digit_features() -> np.ndarray:
    """Which digits and pairs of digits each code has: multi-hot float32 [V F]; the stop id has none."""
    digits = np.asarray(fsq.to_digits(jnp.arange(CODES), LEVELS))
    single = [np.eye(level)[digits[:, d]] for d, level in enumerate(LEVELS)]
    pair = [
        np.eye(LEVELS[a] * LEVELS[b])[digits[:, a] * LEVELS[b] + digits[:, b]]
        for a, b in itertools.combinations(range(len(LEVELS)), 2)
    ]
    features = np.concatenate(single + pair, axis=1, dtype=np.float32)
    return np.concatenate([features, np.zeros((1, features.shape[1]), np.float32)])


def init_params(key: Array, config: transformer.Config) -> Params:
    """Random weights to train: {"model": the transformer's, "parts": {"table_0", "head"} [F D]}; see ``compose``."""
    model, features = transformer.init_params(key, config), digit_features()
    parts = {}
    for name in ("table_0", "head"):
        key, part = jax.random.split(key)
        parts[name] = jax.random.normal(part, (features.shape[1], config.width)) * (config.width * 15) ** -0.5
        model[name] = model[name] * 0.1
    return {"model": model, "parts": parts}


def compose(params: Params, features: Array) -> Params:
    """The transformer's own parameters: its code tables plus the sums of their parts."""
    summed = {name: params["model"][name] + features @ part for name, part in params["parts"].items()}
    return {**params["model"], **summed}


def loss(config: transformer.Config, guided_layers: tuple[int, ...], guidance: float = 0.4) -> Loss:
    """Cross-entropy of the codes in nats, and of the first attention head of the guided layers against where to look."""
    model, features = transformer.Transformer(config), digit_features()

    def value(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        (logits, _, _), seen = model.apply({"params": compose(params, features)}, batch.tokens, mutable="intermediates")
        counted = batch.target != IGNORE
        chosen = jnp.take_along_axis(logits, jnp.maximum(batch.target, 0)[..., None], axis=-1)[..., 0]
        nats = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0).sum() / counted.sum()
        guide = sum(looking(seen, layer, batch.look) for layer in guided_layers) / len(guided_layers)
        return nats + guidance * guide, {"nats": nats, "guide": guide}

    return value


def looking(seen: Any, layer: int, look: Array) -> Array:
    """-log of the attention that the first head of a layer pays to ``look`` int32 [B T]; half of the neighbours' counts too.

    ``seen`` are the intermediates that the transformer gave. Where no place is known, nothing is asked.
    """
    weights = seen["intermediates"][f"layer_{layer}"]["attention"]["attention"][0][:, 0, 0]
    at = (jnp.take_along_axis(weights, jnp.maximum(look + shift, 0)[..., None], axis=-1)[..., 0] for shift in (-1, 0, 1))
    before, here, after = at
    counted = look != IGNORE
    missed = -jnp.log(here + 0.5 * (before + after) + 1e-6)
    return jnp.where(counted, missed, 0).sum() / jnp.maximum(counted.sum(), 1)


def row(utterance: Recording, reading: Reading, rng: np.random.Generator, frame_s: float) -> Batch:
    """One utterance as ids, targets and places to look, each int32 [S]; the prompt gives no loss."""
    symbols = to_symbols(utterance.text, lambda _: rng.random() < reading.spell)
    ids, codes = prompt(symbols, utterance.voice), utterance.signal.astype(np.int32)
    ignored = np.full(len(ids) - 1, IGNORE, np.int32)
    if not utterance.phones:  # the target's own speech, whose phones nobody knows
        return Batch(
            np.concatenate([ids, codes]), np.concatenate([ignored, codes, [STOP]]), np.full(len(ids) + len(codes), IGNORE)
        )
    names, ends = [p for p, _ in utterance.phones], np.array([end for _, end in utterance.phones])
    place = align(names, ["<", *symbols, ">"])
    frame = np.minimum(np.searchsorted(ends, (np.arange(len(codes)) + 0.5) * frame_s), len(ends) - 1)
    return Batch(
        np.concatenate([ids, _disturb(codes, reading.disturb, rng)]),
        np.concatenate([ignored, codes, [STOP]]),
        np.concatenate([ignored, place[frame], [len(ids) - 1]]),
    )


def _disturb(codes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Moves a share of the codes by one level in one digit, as a sampled code may be off when the model speaks."""
    radix, levels = np.cumprod((1, *LEVELS[:-1])), np.array(LEVELS)
    which, up = rng.integers(len(LEVELS), size=len(codes)), rng.integers(2, size=len(codes)) * 2 - 1
    digit = codes // radix[which] % levels[which]
    allowed = (digit + up >= 0) & (digit + up < levels[which]) & (rng.random(len(codes)) < share)
    return codes + np.where(allowed, up * radix[which], 0)


def batches(folders: list[Path], reading: Reading, frame_s: float, seed: int) -> Iterator[Batch]:
    """Batches of rows of like length for ever, each utterance once a round, from folders of encoded shards."""
    rng = np.random.default_rng(seed)
    utterances = [u for folder in folders for path in sorted(folder.glob("*.npz")) for u in read_shard(path)]
    waiting: dict[int, list[Batch]] = {size: [] for size in reading.buckets}
    while True:
        for index in rng.permutation(len(utterances)):
            example = row(utterances[index], reading, rng, frame_s)
            size = next((s for s in reading.buckets if s >= len(example.tokens)), None)
            if size is None:
                continue
            waiting[size].append(example)
            if len(waiting[size]) == reading.tokens // size:
                yield _stack(waiting[size], size)
                waiting[size] = []


def _stack(rows: list[Batch], size: int) -> Batch:
    def padded(name: str, fill: int) -> np.ndarray:
        return np.stack([np.pad(getattr(r, name), (0, size - len(r.tokens)), constant_values=fill) for r in rows])

    return Batch(padded("tokens", 0), padded("target", IGNORE), padded("look", IGNORE))
