"""The models of a benchmark: the built-in voice, a converted folder, or random weights of a preset's shapes; with any draft."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxspec import mesh, mirror
from jaxspec.bench import presets
from jaxspec.bench.cases import Case, DraftModel, Models, groups_of, random_requests
from jaxspec.bench.settings import OWN, Settings
from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.pretrained import Pretrained
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.synthesis import converted
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Drafter, Requests, Synthesizer
from jaxspec.synthesis.contract import Settings as SynthesisSettings
from jaxspec.synthesis.load import NGRAM, builtin_target, load_drafter
from jaxspec.synthesis.mirrored import draft_shape
from jaxspec.text.held_out import held_out


def load(settings: Settings, dtype: str) -> Models:
    """The models of a benchmark, on the device.

    Args:
        settings: that were checked.
        dtype: of weights and caches.

    Raises:
        ValueError: a draft that does not go with the preset, or a batch that does not fit in the device's memory.
    """
    if settings.preset == "builtin":
        models = _builtin(settings)
    else:
        models = _converted(settings, dtype) if settings.real else _random(settings, dtype)
    for name, draft in models.drafts.items():
        if settings.mirror and draft.shape is None:
            raise ValueError(mirror.NO_MODEL.format(name))
    return models


def _builtin(settings: Settings) -> Models:
    synthesizer = builtin()
    return _real(settings, synthesizer, builtin_target(synthesizer.target_params), own_draft(synthesizer))


def _converted(settings: Settings, dtype: str) -> Models:
    target = pretrained.load(settings.preset, dtype)
    return _real(settings, converted.synthesizer(target), target, None)


def own_draft(synthesizer: Synthesizer) -> DraftModel | None:
    """The draft that comes with the built-in voice; None for other synthesizers, which come without."""
    return DraftModel(synthesizer.drafter, None) if synthesizer.drafter else None


def draft_models(names: Sequence[str], target: Pretrained, own: DraftModel | None) -> dict[str, DraftModel]:
    """Drafts for a target, by name.

    Args:
        names: "builtin", "ngram" or folders.
        target: that they draft for.
        own: the draft that comes with the target; None where there is none.

    Raises:
        ValueError: there is no draft of a name, or it does not fit the target.
    """
    return {name: _draft_model(name, target, own) for name in names}


def _draft_model(name: str, target: Pretrained, own: DraftModel | None) -> DraftModel:
    if name == OWN:
        if own is None:
            raise ValueError(f"expected a draft for {target.folder}, got none: give ngram or a folder as --draft")
        return own
    shape = None if name == NGRAM else draft_shape(name, target.model.shape.dtype)
    return DraftModel(load_drafter(name, target), shape)


def _random(settings: Settings, dtype: str) -> Models:
    if unknown := set(settings.drafts) - {OWN, NGRAM}:
        raise ValueError(
            f"expected --draft {OWN} or {NGRAM} with the preset {settings.preset}, whose weights are random, got "
            f"{min(unknown)!r}: give the folder of its target as --preset"
        )
    pair = presets.pair(settings.preset, dtype, settings.weights, mesh.parts("vocab"))
    pair = pair if OWN in settings.drafts else pair._replace(draft=None)
    _check_fits(settings, pair)
    target_key, draft_key = jax.random.split(jax.random.key(0))
    drafts = {NGRAM: DraftModel(Drafter(functools.partial(ngram_draft, vocab=pair.target.vocab), ()), None)}
    if pair.draft is not None:
        make = functools.partial(model_draft, transformer.language_model(pair.draft))
        drafts[OWN] = DraftModel(Drafter(make, presets.random_params(draft_key, pair.draft)), pair.draft)
    groups = presets.neighbours(pair.target.vocab, pair.num_codes)
    return Models(
        name=settings.preset,
        target=pair.target,
        target_params=presets.random_params(target_key, pair.target),
        drafts={name: drafts[name] for name in settings.drafts},
        groups=lambda threshold: groups,
        requests=random_requests(pair.num_codes, settings.new_tokens, Sampling(temperature=0.8, top_p=0.95)),
        acceptance=settings.synthetic_acceptance,
    )


def _real(settings: Settings, synthesizer: Synthesizer, target: Pretrained, own: DraftModel | None) -> Models:
    """Models that synthesize the held-out sentences, other ones in each repeat."""
    drafts = draft_models(settings.drafts, target, own)
    for name, draft in drafts.items():
        longest, asked = draft.drafter.max_length, max(settings.draft_lengths)
        if longest is not None and asked > longest:
            raise ValueError(f"expected draft lengths of at most {longest} for {name}, got {asked}: it was trained for that")
    return Models(
        name=settings.preset,
        target=target.model.shape,
        target_params=synthesizer.target_params,
        drafts=drafts,
        groups=groups_of(synthesizer),
        requests=text_requests(synthesizer, held_out(), settings.new_tokens),
    )


def text_requests(synthesizer: Synthesizer, texts: Sequence[str], new_tokens: int) -> Callable[[Case, int], Requests]:
    """The first pieces of some texts, other ones in each repeat.

    Args:
        synthesizer: makes the prompts.
        texts: that can be spoken.
        new_tokens: of each row, at most.

    Returns:
        (case, number of the repeat) -> its requests.
    """

    def requests(case: Case, repeat: int) -> Requests:
        some = [synthesizer.pieces(texts[(repeat * case.batch + i) % len(texts)])[0] for i in range(case.batch)]
        asked = synthesizer.requests(some, SynthesisSettings(max_codes=new_tokens))
        capacity, limit = max(asked.max_new_tokens, new_tokens), np.minimum(asked.limit, new_tokens)
        return asked._replace(max_new_tokens=capacity, limit=limit)

    return requests


def _check_fits(settings: Settings, pair: presets.Pair) -> None:
    """Raises ValueError where weights, caches and probs of the largest batch exceed the device's memory."""
    batch, draft_length = max(settings.batches), max(settings.draft_lengths)
    cells = max(settings.prompts) + settings.new_tokens + draft_length + 1
    configs = [config for config in pair[:2] if config is not None]
    parts = {
        "weights": sum(map(presets.parameter_bytes, configs)),
        "caches": sum(presets.cache_bytes(config, batch, cells) for config in configs),
        "probs": 4 * 4 * batch * (2 * draft_length + 1) * pair.target.vocab,
    }
    limit = memory_bytes()
    if limit and sum(parts.values()) > limit:
        sizes = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts.items())
        raise ValueError(
            f"expected a batch that fits in {limit / 1e9:.1f} GB, got {sizes} for {settings.preset} with batch {batch} and "
            f"{cells} cells: lower --batches, --prompts or --new-tokens"
        )


@functools.cache
def memory_bytes() -> int | None:
    """The memory of the device in bytes; None where it is unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
