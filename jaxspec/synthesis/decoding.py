"""The settings resolved against a synthesizer, once: which verifier, which draft; and one batch of tokens made by them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import speculate
from jaxspec.codec.padding import padded_batch
from jaxspec.common.compilation_cache import call, describe, description_of
from jaxspec.state import NON_FINITE, Generation, Info
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.types import Draft, Verify
from jaxspec.verify.rules import by_name

describe(speculate.generate_request, "generate")
describe(speculate.autoregressive_request, "autoregressive")
for _kind in (Generation, Info):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"jaxspec.{_kind.__name__}")

PLAIN = "autoregressive"


class Decoding(NamedTuple):
    """How tokens are decoded. Make it once with ``resolve`` and use it for every batch."""

    name: str  # one of VERIFIERS
    draft: Draft | None = None  # None: one token a step
    verify: Verify | None = None  # None where there is no draft


def resolve(synthesizer: Synthesizer, settings: Settings) -> Decoding:
    """The verifier and the draft that the settings name.

    Raises:
        ValueError: the settings need a draft, and there is none.
    """
    name = settings.verify or "coarse-grained"
    if settings.draft_length == 0 or name == PLAIN:
        return Decoding(PLAIN)
    if synthesizer.drafter is None:
        if settings.verify is None:
            return Decoding(PLAIN)
        raise ValueError(f"expected a draft for {name}, got none: give --draft, or --verify {PLAIN}")
    drafter = synthesizer.drafter
    if drafter.max_length is not None and settings.draft_length > drafter.max_length:
        raise ValueError(
            f"expected a draft length of at most {drafter.max_length}, got {settings.draft_length}: it was trained for that"
        )
    draft = drafter.make(settings.draft_length)
    if description := description_of(drafter.make):
        describe(draft, f"{description}, K = {settings.draft_length}")
    return Decoding(name, draft, _verifier(name, synthesizer, settings))


def _verifier(name: str, synthesizer: Synthesizer, settings: Settings) -> Verify:
    """The verifier of a name, described for ``call``."""
    name = "coarse-grained" if name == "auto" else name
    threshold = synthesizer.threshold if settings.threshold is None else settings.threshold
    made = by_name(name, settings.beta, lambda: synthesizer.groups(threshold, settings.matrix))
    return describe(made, f"verify {name}")


def tokens_of(
    pieces: Sequence[str], keys: jax.Array, synthesizer: Synthesizer, settings: Settings, decoding: Decoding
) -> Generation:
    """The tokens of some pieces of text, in one batch, on the host.

    Args:
        pieces: n parts of texts, n of 1 or more.
        keys: [padded_batch(n)], one for each row, those beyond n unused.
        synthesizer: whose target and prompts.
        settings: of the prompts and the sampling.
        decoding: what ``resolve`` made of the settings.

    Returns:
        A generation of n rows, numpy arrays.

    Raises:
        ValueError: a prompt cannot be made, or the model's logits are not finite.
    """
    count, batch = len(pieces), padded_batch(len(pieces))
    requests = synthesizer.requests([*pieces, *[pieces[0]] * (batch - count)], settings)
    limit = np.where(np.arange(batch) < count, requests.limit, 0)  # rows that fill the batch up emit nothing
    requests = requests._replace(limit=limit)
    target, params, most = synthesizer.target, synthesizer.target_params, requests.max_new_tokens
    checked = speculate.check_request(keys, target, params, *requests)
    if decoding.draft is None or decoding.verify is None or synthesizer.drafter is None:
        generation = call(speculate.autoregressive_request, (target, most), params, checked)
    else:
        rule, static = speculate.as_pytree(decoding.verify), (target, decoding.draft, most)
        generation = call(speculate.generate_request, static, params, synthesizer.drafter.params, rule, checked)
    generation = jax.tree.map(lambda array: array[:count], jax.device_get(generation))
    if (generation.info.stop_reason == NON_FINITE).any():
        raise ValueError("expected finite logits from the model, but some are NaN or infinite: its weights are damaged")
    return generation
