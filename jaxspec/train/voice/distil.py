"""The draft learns from the target: from its law, on the recordings and on what the target itself says (arXiv 2310.08461)."""

import itertools
from collections.abc import Iterator
from pathlib import Path

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
from jaxspec.train.voice.language_model import IGNORE, Batch, compose, digit_features, looking
from jaxspec.train.voice.sentences import sentences
from jaxspec.types import Array, Params

_BATCH = 32


def sample_shards(
    out: Path, config: transformer.Config, params: Params, sampling: Sampling, count: int, seed: int
) -> Iterator[str]:
    """Lets the target speak ``count`` new sentences into shards of codes; yields a line a shard. Shards that exist are kept."""
    out.mkdir(parents=True, exist_ok=True)
    lm, fit = transformer.language_model(config), (s for s in sentences(seed) if len(symbols.to_symbols(s)) <= MAX_SYMBOLS)
    for index in range(-(-count // _BATCH)):
        texts, path = list(itertools.islice(fit, _BATCH)), out / f"sampled-{index:05d}.npz"
        if path.exists():
            continue
        names = list(itertools.islice(itertools.cycle(VOICES), _BATCH))
        padded, lengths = prompts(texts, names)
        key = jax.random.fold_in(jax.random.key(seed), index)
        said = autoregressive(key, lm, params, padded, lengths, max_new_tokens=MAX_CODES, stop_ids=(STOP,), sampling=sampling)
        rows = [row[:n] for row, n in zip(np.asarray(said.tokens), np.asarray(said.length), strict=True)]
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
    """KL divergence from the target's law to the draft's plus their total variation, which is what a rejection costs.

    Both laws are taken at the temperature that is sampled with. Acceptance of the exact rule is 1 - total variation.
    """
    model, features = transformer.Transformer(config), digit_features()
    target = transformer.Transformer(target_config)

    def value(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        (logits, _, _), seen = model.apply({"params": compose(params, features)}, batch.tokens, mutable="intermediates")
        wanted, _, _ = target.apply({"params": target_params}, batch.tokens)
        ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, jax.lax.stop_gradient(wanted)))
        counted = batch.target != IGNORE
        divergence = jnp.where(counted, (jnp.exp(theirs) * (theirs - ours)).sum(-1), 0).sum() / counted.sum()
        distance = jnp.abs(jnp.exp(theirs) - jnp.exp(ours)).sum(-1) / 2
        variation = jnp.where(counted, distance, 0).sum() / counted.sum()
        guide = sum(looking(seen, layer, batch.look) for layer in guided_layers) / len(guided_layers)
        total = divergence + variation + guidance * guide
        return total, {"divergence": divergence, "total_variation": variation, "guide": guide}

    return value
