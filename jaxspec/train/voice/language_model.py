"""Training of the target on codes and their text, with composed embeddings and attention guidance.

Two things let a small model learn fast. The rows of the code tables are sums of learnt parts, one for each digit of a code and
one for each pair of digits, so that codes which sound alike share parameters; the sums are written out when training ends. And
one attention head in a few layers is guided to the symbol that is being spoken, which flite reports, so that the text is read in
order.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
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
    """Training examples, each int32 [B S]: ids, the next code of each, the position to attend to; IGNORE for none."""

    tokens: Array | np.ndarray
    target: Array | np.ndarray
    look: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """How texts and codes are presented in training."""

    spell: float = 0.08  # the fraction of dictionary words given in letters
    disturb: float = 0.06  # the fraction of input codes moved by one level in one digit
    buckets: tuple[int, ...] = (80, 112, 144, 176, 224, 288, 352)  # lengths of rows; longer ones are left out
    tokens: int = 2048  # in a batch


def digit_features() -> np.ndarray:
    """The digits and pairs of digits of each code, multi-hot float32 [V F]; the stop id has none."""
    digits = np.asarray(fsq.to_digits(jnp.arange(CODES, dtype=jnp.int32), LEVELS))
    single = [np.eye(level)[digits[:, d]] for d, level in enumerate(LEVELS)]
    pair = [
        np.eye(LEVELS[a] * LEVELS[b])[digits[:, a] * LEVELS[b] + digits[:, b]]
        for a, b in itertools.combinations(range(len(LEVELS)), 2)
    ]
    features = np.concatenate(single + pair, axis=1, dtype=np.float32)
    return np.concatenate([features, np.zeros((1, features.shape[1]), np.float32)])


def init_params(key: Array, config: transformer.Config) -> Params:
    """Random weights to train; see ``compose``.

    Args:
        key: consumed.
        config: the transformer's shape.

    Returns:
        {"model": the transformer's weights, "parts": {"table_0", "head"}, each float32 [F D]}.
    """
    model, features = transformer.init_params(key, config), digit_features()
    parts = {}
    for name in ("table_0", "head"):
        key, part = jax.random.split(key)
        parts[name] = jax.random.normal(part, (features.shape[1], config.width), jnp.float32) * (config.width * 15) ** -0.5
        model[name] = model[name] * 0.1
    return {"model": model, "parts": parts}


def compose(params: Params, features: Array) -> Params:
    """The transformer's parameters: its code tables plus the sums of their parts.

    Args:
        params: of ``init_params``.
        features: of ``digit_features``, [V F].

    Returns:
        weights as ``transformer.init_params`` gives them.
    """
    summed = {name: params["model"][name] + features @ part for name, part in params["parts"].items()}
    return {**params["model"], **summed}


def loss(config: transformer.Config, guided_layers: tuple[int, ...], guidance: float = 0.4) -> Loss:
    """The target's loss: cross-entropy of the codes in nats, plus attention guidance.

    Args:
        config: the transformer's shape.
        guided_layers: the layers whose first head is guided.
        guidance: the weight of the guidance.

    Returns:
        a loss for ``train.loop.fit`` over (params of ``init_params``, ``Batch``, key).
    """
    model, features = transformer.Transformer(config), jnp.asarray(digit_features())

    def value(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        (logits, _, _), captured = model.apply({"params": compose(params, features)}, batch.tokens, mutable="intermediates")
        counted = batch.target != IGNORE
        chosen = jnp.take_along_axis(logits, jnp.maximum(batch.target, 0)[..., None], axis=-1)[..., 0]
        nats = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0).sum() / counted.sum(dtype=jnp.float32)
        guide = guidance_loss(captured, guided_layers, batch.look)
        return nats + guidance * guide, {"nats": nats, "guide": guide}

    return value


def guidance_loss(captured: Any, layers: Sequence[int], look: Array | np.ndarray) -> Array:
    """Attention guidance: the mean over layers of -log of the attention of the first head to the positions ``look``.

    Half of the attention to the two neighbours of a position counts as attention to it.

    Args:
        captured: the intermediates of the transformer.
        layers: the guided ones.
        look: positions, int32 [B S]; IGNORE where none is known, which costs nothing.

    Returns:
        float32 [].
    """
    return sum((_missed_attention(captured, layer, look) for layer in layers), jnp.float32(0)) / len(layers)


def _missed_attention(captured: Any, layer: int, look: Array | np.ndarray) -> Array:
    weights = captured["intermediates"][f"layer_{layer}"]["attention"]["attention"][0][:, 0, 0]
    at = (jnp.take_along_axis(weights, jnp.maximum(look + shift, 0)[..., None], axis=-1)[..., 0] for shift in (-1, 0, 1))
    before, here, after = at
    counted = look != IGNORE
    missed = -jnp.log(here + 0.5 * (before + after) + 1e-6)
    return jnp.where(counted, missed, 0).sum() / jnp.maximum(counted.sum(dtype=jnp.float32), 1)


def row(recording: Recording, reading: Reading, rng: np.random.Generator, frame_s: float) -> Batch:
    """One encoded recording as a training example; the prompt has no loss.

    Args:
        recording: its signal is codes.
        reading: how to present it.
        rng: draws which words are spelled and which codes are moved.
        frame_s: the duration of a code in seconds.

    Returns:
        a Batch of int32 [S] in place of [B S]. Without phones (samples of the target) there is no position to attend to.
    """
    symbols = to_symbols(recording.text, lambda _: rng.random() < reading.spell)
    ids, codes = prompt(symbols, recording.voice), recording.signal.astype(np.int32)
    ignored = np.full(len(ids) - 1, IGNORE, np.int32)
    target = np.concatenate([ignored, codes, np.array([STOP], np.int32)])
    if not recording.phones:
        return Batch(np.concatenate([ids, codes]), target, np.full_like(target, IGNORE))
    phones, ends = [phone for phone, _ in recording.phones], np.array([end for _, end in recording.phones])
    positions = align(phones, ["<", *symbols, ">"])
    frames = np.minimum(np.searchsorted(ends, (np.arange(len(codes)) + 0.5) * frame_s), len(ends) - 1)
    look = np.concatenate([ignored, positions[frames], np.array([len(ids) - 1], np.int32)])
    return Batch(np.concatenate([ids, _disturb(codes, reading.disturb, rng)]), target, look)


def _disturb(codes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Moves a fraction of the codes by one level in one digit, as sampled codes may be off by as much."""
    radix, levels = np.cumprod((1, *LEVELS[:-1])), np.array(LEVELS)
    which, up = rng.integers(len(LEVELS), size=len(codes)), rng.integers(2, size=len(codes)) * 2 - 1
    digit = codes // radix[which] % levels[which]
    allowed = (digit + up >= 0) & (digit + up < levels[which]) & (rng.random(len(codes)) < share)
    return codes + np.where(allowed, up * radix[which], 0).astype(codes.dtype)


def batches(folders: list[Path], reading: Reading, frame_s: float, seed: int) -> Iterator[Batch]:
    """Batches of rows of similar length, without end; each epoch has every recording once, in random order.

    Args:
        folders: of encoded shards.
        reading: how to present the recordings.
        frame_s: the duration of a code in seconds.
        seed: of the order and of ``row``.

    Yields:
        batches of int32 [B S], S one of the buckets.

    Raises:
        ValueError: there are no recordings, or a shard is damaged.
    """
    rng = np.random.default_rng(seed)
    recordings = [one for folder in folders for path in sorted(folder.glob("*.npz")) for one in read_shard(path)]
    if not recordings:
        raise ValueError(f"expected encoded recordings in {', '.join(map(str, folders))}, got none: encode the corpus first")
    waiting: dict[int, list[Batch]] = {size: [] for size in reading.buckets}
    while True:
        for index in rng.permutation(len(recordings)):
            example = row(recordings[index], reading, rng, frame_s)
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
