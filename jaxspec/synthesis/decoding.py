"""The settings resolved against a synthesizer, once: which verifier, which draft; and one batch of tokens made by them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import verify
from jaxspec.speculate import autoregressive, generate
from jaxspec.state import NON_FINITE, Generation
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.types import Draft, Verify


class Decoding(NamedTuple):
    """How tokens are decoded. Make it once with ``resolve`` and use it for every batch."""

    name: str  # one of VERIFIERS
    draft: Draft | None  # None: one token a step
    verify: Verify | None  # None where there is no draft

    def plain(self) -> "Decoding":
        """The same without its draft."""
        return Decoding("autoregressive", None, None)


def resolve(synthesizer: Synthesizer, settings: Settings) -> Decoding:
    """The verifier and the draft that the settings name.

    Raises:
        ValueError: the settings need a draft, and there is none.
    """
    name = settings.verify or "coarse-grained"
    if synthesizer.drafter is None and settings.verify not in (None, "autoregressive") and settings.draft_length:
        raise ValueError(f"expected a draft for {name}, got none: give --draft, or --verify autoregressive")
    if synthesizer.drafter is None or name == "autoregressive" or settings.draft_length == 0:
        return Decoding("autoregressive", None, None)
    return Decoding(name, synthesizer.drafter(settings.draft_length), _verifier(name, synthesizer, settings))


def _verifier(name: str, synthesizer: Synthesizer, settings: Settings) -> Verify:
    if name == "exact":
        return verify.exact()
    if name == "tolerance":
        return verify.tolerance(settings.beta)
    threshold = synthesizer.threshold if settings.threshold is None else settings.threshold
    return verify.coarse_grained(synthesizer.groups(threshold, settings.matrix))


def tokens_of(
    pieces: Sequence[str], keys: jax.Array, synthesizer: Synthesizer, settings: Settings, decoding: Decoding
) -> Generation:
    """The tokens of some pieces of text, in one batch, on the host.

    Args:
        pieces: n parts of texts, n of 1 or more.
        keys: [n].
        synthesizer: whose target and prompts.
        settings: of the prompts and the sampling.
        decoding: what ``resolve`` made of the settings.

    Returns:
        A generation of n rows, numpy arrays.

    Raises:
        ValueError: a prompt cannot be made, or the model's logits are not finite.
    """
    batch = batch_size(len(pieces))
    filled = [*pieces, *pieces[:1] * (batch - len(pieces))]  # rows that fill the batch up emit nothing
    requests = synthesizer.requests(filled, settings)
    requests = requests._replace(limit=np.where(np.arange(batch) < len(pieces), requests.limit, 0))._asdict()
    keys = keys[np.arange(batch) % len(pieces)]
    target = synthesizer.target, synthesizer.target_params
    if decoding.draft is None or decoding.verify is None:
        generation = autoregressive(keys, *target, **requests)
    else:
        generation = generate(keys, *target, decoding.draft, synthesizer.draft_params, decoding.verify, **requests)
    generation = jax.tree.map(lambda array: np.asarray(array)[: len(pieces)], generation)
    if (generation.info.stop_reason == NON_FINITE).any():
        raise ValueError("expected finite logits from the model, but some are NaN or infinite: its weights are damaged")
    return generation


def batch_size(count: int) -> int:
    """The batch that ``count`` pieces go in: a power of two, so that few shapes are compiled.

    >>> [batch_size(count) for count in (1, 2, 3, 9)]
    [1, 2, 4, 16]
    """
    return 1 << (count - 1).bit_length()
