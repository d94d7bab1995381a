"""How far the logits of a voice with other weights are from its own, on codes that it emitted."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from jaxspec.models import transformer
from jaxspec.models.builtin import Voice, prompts
from jaxspec.types import Array, Params

_ROWS = 8  # scored at a time


class Precision(NamedTuple):
    """The differences of two sets of logits over the same codes.

    Attributes:
        logit_error: the root mean square of the differences over that of the logits, both less their mean over the vocabulary,
            which the sampling does not see.
        total_variation: the mean total variation of the distributions of the next code, at temperature 1.
        same_best: the fraction of codes whose most likely one is the same.
    """

    logit_error: float
    total_variation: float
    same_best: float


def precision(own: Voice, other: Voice, pieces: Sequence[str], names: Sequence[str], codes: Sequence[np.ndarray]) -> Precision:
    """Scores each piece and the codes that were emitted for it by both voices.

    Args:
        own: the voice.
        other: of the same shape, with other weights.
        pieces: normalised texts, each short enough for a prompt.
        names: the voice of each, among ``models.builtin.VOICES``.
        codes: int32 [T] of each.
    """
    (prompt, length), longest = prompts(pieces, names), max(map(len, codes))
    tokens = np.pad(prompt, ((0, 0), (0, longest)))
    for row, first, some in zip(tokens, length, codes, strict=True):
        row[first : first + len(some)] = some
    sums, count = np.zeros(4), 0
    for first in range(0, len(tokens), _ROWS):
        block = slice(first, first + _ROWS)
        place, end = np.arange(tokens.shape[1])[None], np.array([len(some) for some in codes[block]]) + length[block]
        counted = (place >= length[block, None] - 1) & (place < end[:, None])
        ours, theirs = (_logits(voice.target, voice.target_params, jnp.asarray(tokens[block]))[counted] for voice in (own, other))
        sums, count = sums + np.array(_differences(ours, theirs)), count + len(ours)
    moved, size, variation, same = sums
    return Precision(float(np.sqrt(moved / size)), float(variation / count), float(same / count))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: transformer.Config, params: Params, tokens: Int32[Array, "B T"]) -> Float[Array, "B T V"]:
    output: Any = transformer.Transformer(dataclasses.replace(config, feature_layers=())).apply({"params": params}, tokens)
    return output[0]


def _differences(ours: Float[Array, "N V"], theirs: Float[Array, "N V"]) -> tuple[Array, Array, Array, Array]:
    """Sums over the codes: squared differences and squared logits, total variations, and equal choices."""
    centred, others = (logits - logits.mean(axis=1, keepdims=True) for logits in (ours, theirs))
    variation = 0.5 * jnp.abs(jax.nn.softmax(ours) - jax.nn.softmax(theirs)).sum(axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    return ((centred - others) ** 2).sum(), (centred**2).sum(), variation.sum(), same.sum()
