"""Distillation of the draft: on the target's distribution, over recordings and over samples of the target (arXiv 2310.08461)."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.models import transformer
from jaxspec.models.builtin import MAX_CODES, MAX_SYMBOLS, STOP, VOICES, prompts
from jaxspec.sampling import Sampling
from jaxspec.speculate import autoregressive
from jaxspec.text import symbols
from jaxspec.train.loop import Loss
from jaxspec.train.voice.corpus import Recording, write_shard
from jaxspec.train.voice.language_model import IGNORE, Batch, compose, digit_features, guidance_loss
from jaxspec.train.voice.sentences import sentences
from jaxspec.types import Array, Params

_BATCH = 32


def sample_shards(
    out: Path, config: transformer.Config, params: Params, sampling: Sampling, count: int, seed: int
) -> Iterator[str]:
    """Synthesises new sentences with the target and writes their codes as shards. Shards that exist are kept.

    Args:
        out: the folder of the shards; created if it does not exist.
        config: the target's shape.
        params: the target's weights.
        sampling: how to sample.
        count: sentences, rounded up to whole shards.
        seed: of the sentences and of the samples.

    Yields:
        a line of text after each shard.
    """
    out.mkdir(parents=True, exist_ok=True)
    lm, short = transformer.language_model(config), (s for s in sentences(seed) if len(symbols.to_symbols(s)) <= MAX_SYMBOLS)
    for index in range(-(-count // _BATCH)):
        texts, path = list(itertools.islice(short, _BATCH)), out / f"sampled-{index:05d}.npz"
        if path.exists():
            continue
        names = list(itertools.islice(itertools.cycle(VOICES), _BATCH))
        padded, lengths = prompts(texts, names)
        key = jax.random.fold_in(jax.random.key(seed), index)
        shared = {"max_new_tokens": MAX_CODES, "stop_ids": (STOP,), "sampling": sampling}
        generation = autoregressive(key, lm, params, padded, lengths, **shared)
        rows = [row[:n] for row, n in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True)]
        codes = [row[row != STOP].astype(np.uint16) for row in rows]
        write_shard(path, [Recording(t, name, [], c) for t, name, c in zip(texts, names, codes, strict=True)])
        yield f"{path.name}: {sum(map(len, codes))} codes"


def loss(
    config: transformer.Config,
    target_config: transformer.Config,
    target_params: Params,
    temperature: float,
    guided_layers: tuple[int, ...],
    guidance: float = 0.4,
) -> Loss:
    """The draft's loss: KL divergence of its distribution from the target's, plus total variation, plus attention guidance.

    The exact rule accepts with probability 1 - total variation. Both distributions are taken at the sampling temperature.

    Args:
        config: the draft's shape.
        target_config: the target's shape.
        target_params: the target's weights, which stay fixed.
        temperature: of both distributions, above 0.
        guided_layers: the draft's layers with attention guidance.
        guidance: its weight.

    Returns:
        a loss for ``train.loop.fit`` over (params of ``language_model.init_params``, ``language_model.Batch``, key).
    """
    model, features = transformer.Transformer(config), jnp.asarray(digit_features())
    target = transformer.Transformer(target_config)

    def value(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        (logits, _, _), captured = model.apply({"params": compose(params, features)}, batch.tokens, mutable="intermediates")
        wanted: Any = target.apply({"params": target_params}, batch.tokens)[0]
        log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (logits, jax.lax.stop_gradient(wanted)))
        counted = batch.target != IGNORE
        divergence = _mean((jnp.exp(log_q) * (log_q - log_p)).sum(-1), counted)
        variation = _mean(jnp.abs(jnp.exp(log_q) - jnp.exp(log_p)).sum(-1) / 2, counted)
        guide = guidance_loss(captured, guided_layers, batch.look)
        total = divergence + variation + guidance * guide
        return total, {"divergence": divergence, "total_variation": variation, "guide": guide}

    return value


def _mean(values: Array, counted: Array) -> Array:
    return jnp.where(counted, values, 0).sum() / counted.sum(dtype=jnp.float32)
