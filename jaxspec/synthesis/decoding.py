"""The settings resolved against a synthesizer, once: which verifier, which draft; and one batch of tokens made by them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec import mirror, speculate
from jaxspec.codec.padding import padded_batch
from jaxspec.common.compilation_cache import call, describe, description_of
from jaxspec.mirror import Mirror
from jaxspec.state import NON_FINITE, Generation, Info
from jaxspec.synthesis.contract import Requests, Settings, Synthesizer
from jaxspec.types import Draft, Verify
from jaxspec.verify.rules import by_name

describe(speculate.generate_request, "generate")
describe(speculate.autoregressive_request, "autoregressive")
for _kind in (Generation, Info):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"jaxspec.{_kind.__name__}")

PLAIN = "autoregressive"
NOT_FINITE = "expected finite logits from the model, but some are NaN or infinite: its weights are damaged"
DRAFT_LENGTH = 3  # K of a draft that was not tuned


class Decoding(NamedTuple):
    """How tokens are decoded. Make it once with ``resolve`` and use it for every batch."""

    name: str  # one of VERIFIERS
    draft: Draft | None = None  # None: one token a step
    verify: Verify | None = None  # None where there is no draft
    mirror: Mirror | None = None  # None where the draft is on the target's devices

    @property
    def draft_length(self) -> int:
        """K; 0 without a draft."""
        return self.draft.length if self.draft else 0


def with_defaults(synthesizer: Synthesizer, settings: Settings) -> Settings:
    """The settings with a verifier, a draft length and a threshold where they name none: those that were tuned for the draft."""
    drafter = synthesizer.drafter
    if drafter is None:
        usual = Settings(verify=PLAIN, draft_length=DRAFT_LENGTH)
    elif drafter.tuned is not None:
        usual = Settings(**{name: getattr(drafter.tuned, name) for name in ("verify", "draft_length", "threshold")})
    else:
        usual = Settings(verify="coarse-grained", draft_length=min(DRAFT_LENGTH, drafter.max_length or DRAFT_LENGTH))
    threshold = synthesizer.threshold if usual.threshold is None else usual.threshold
    return dataclasses.replace(
        settings,
        verify=settings.verify or usual.verify,
        draft_length=usual.draft_length if settings.draft_length is None else settings.draft_length,
        threshold=threshold if settings.threshold is None else settings.threshold,
    )


def resolve(synthesizer: Synthesizer, settings: Settings) -> Decoding:
    """The verifier and the draft that the settings name, or those that were tuned for the draft.

    Raises:
        ValueError: the settings need a draft, and there is none, or one of a shorter draft length.
    """
    settings = with_defaults(synthesizer, settings)
    name, length, drafter = settings.verify, settings.draft_length, synthesizer.drafter
    assert name is not None
    assert length is not None
    if length == 0 or name == PLAIN:
        return Decoding(PLAIN)
    if drafter is None:
        raise ValueError(f"expected a draft for {name}, got none: give --draft, or --verify {PLAIN}")
    if drafter.max_length is not None and length > drafter.max_length:
        raise ValueError(f"expected a draft length of at most {drafter.max_length}, got {length}: it was trained for that")
    draft = drafter.make(length)
    if description := description_of(drafter.make):
        describe(draft, f"{description}, K = {length}")
    rule = _verifier(name, synthesizer, settings)
    return Decoding(name, draft, rule, None if synthesizer.mirror is None else synthesizer.mirror(draft))


def _verifier(name: str, synthesizer: Synthesizer, settings: Settings) -> Verify:
    """The verifier of a name, with settings that name a threshold, described for ``call``."""
    name = "coarse-grained" if name == "auto" else name
    assert settings.threshold is not None
    threshold, matrix = settings.threshold, settings.matrix
    made = by_name(name, settings.beta, lambda: synthesizer.groups(threshold, matrix))
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
    fill = [pieces[0]] * (padded_batch(len(pieces)) - len(pieces))
    return generation_of(synthesizer.requests([*pieces, *fill], settings), len(pieces), keys, synthesizer, decoding)


def generation_of(requests: Requests, count: int, keys: jax.Array, synthesizer: Synthesizer, decoding: Decoding) -> Generation:
    """The tokens of the first ``count`` rows of a batch, on the host; the rows that fill it up emit nothing.

    Args:
        requests: of B rows, B a size of ``padded_batch``.
        count: n, 1 to B.
        keys: [B].
        synthesizer: whose target.
        decoding: what ``resolve`` made of the settings.

    Returns:
        A generation of n rows, numpy arrays.

    Raises:
        ValueError: the model's logits are not finite.
    """
    requests = requests._replace(limit=np.where(np.arange(len(requests.limit)) < count, requests.limit, 0))
    target, params, most = synthesizer.target, synthesizer.target_params, requests.max_new_tokens
    checked = speculate.check_request(keys, target, params, *requests)
    if decoding.draft is None or decoding.verify is None or synthesizer.drafter is None:
        generation = call(speculate.autoregressive_request, (target, most), params, checked)
    elif decoding.mirror is not None:
        rule, draft_params = decoding.verify, synthesizer.drafter.params
        generation = mirror.generate_request(decoding.mirror, most, params, draft_params, rule, checked).generation
    else:
        rule, static = speculate.as_pytree(decoding.verify), (target, decoding.draft, most)
        generation = call(speculate.generate_request, static, params, synthesizer.drafter.params, rule, checked)
    generation = jax.tree.map(lambda array: array[:count], jax.device_get(generation))
    check_finite(generation.info.stop_reason)
    return generation


def check_finite(stop_reason: Any) -> None:
    """Refuses rows, or one, that ended for logits that are not finite.

    Raises:
        ValueError: there is one.
    """
    if np.any(stop_reason == NON_FINITE):
        raise ValueError(NOT_FINITE)
