"""The models of a benchmark: the built-in voice, a converted folder, or random weights of a preset's shapes; with any draft."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from jaxspec.bench import presets
from jaxspec.bench.cases import Case, Models, random_requests
from jaxspec.bench.settings import Settings
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis import converted
from jaxspec.synthesis.contract import Requests, Synthesizer
from jaxspec.synthesis.contract import Settings as SynthesisSettings
from jaxspec.synthesis.load import NGRAM, load_drafter
from jaxspec.synthesis.load import load as load_synthesizer
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
        return _builtin(settings)
    return _converted(settings, dtype) if settings.real else _random(settings, dtype)


def _builtin(settings: Settings) -> Models:
    _check_named(settings)
    voice = voices.load()
    return _real(settings, load_synthesizer(draft=settings.draft), voice.target, None if settings.draft else voice.draft)


def _converted(settings: Settings, dtype: str) -> Models:
    if settings.draft is None:
        raise ValueError(
            f"expected --draft with {settings.preset}, got none: give ngram, or a folder that `jaxspec convert --layers` made"
        )
    target = pretrained.load(settings.preset, dtype)
    synthesizer = converted.synthesizer(target, load_drafter(settings.draft, target))
    description = None if settings.draft == NGRAM else descriptions.read(settings.draft)
    draft = dataclasses.replace(description.shape, dtype=dtype) if isinstance(description, Model) else None
    return _real(settings, synthesizer, target.model.shape, draft)


def _random(settings: Settings, dtype: str) -> Models:
    _check_named(settings)
    pair = presets.pair(settings.preset, dtype)
    pair = pair._replace(draft=None) if settings.draft == NGRAM else pair
    _check_fits(settings, pair)
    target_key, draft_key = jax.random.split(jax.random.key(0))
    if pair.draft is None:
        drafter, draft_params = functools.partial(ngram_draft, vocab=pair.target.vocab), ()
    else:
        drafter = functools.partial(model_draft, transformer.language_model(pair.draft))
        draft_params = presets.random_params(draft_key, pair.draft)
    return Models(
        name=settings.preset,
        target=pair.target,
        target_params=presets.random_params(target_key, pair.target),
        draft=pair.draft,
        drafter=drafter,
        draft_params=draft_params,
        groups=presets.neighbours(pair.target.vocab, pair.target.vocab - pair.stops),
        requests=random_requests(pair.target, pair.stops, settings.new_tokens, Sampling(temperature=0.8, top_p=0.95)),
        acceptance=settings.synthetic_acceptance,
    )


def _check_named(settings: Settings) -> None:
    """Raises ValueError where a preset by name is given the folder of a draft."""
    if settings.draft not in (None, NGRAM):
        raise ValueError(
            f"expected --draft ngram, or none, with the preset {settings.preset}, got {settings.draft!r}: give the folder of its "
            "target as --preset"
        )


def _real(settings: Settings, synthesizer: Synthesizer, target: Config, draft: Config | None) -> Models:
    """Models that synthesize the held-out sentences, other ones in each repeat."""
    texts = held_out()

    def requests(case: Case, repeat: int) -> Requests:
        some = [synthesizer.pieces(texts[(repeat * case.batch + i) % len(texts)])[0] for i in range(case.batch)]
        asked = synthesizer.requests(some, SynthesisSettings(max_codes=settings.new_tokens))
        capacity, limit = max(asked.max_new_tokens, settings.new_tokens), np.minimum(asked.limit, settings.new_tokens)
        return asked._replace(max_new_tokens=capacity, limit=limit)

    if synthesizer.drafter is None:
        raise ValueError(f"expected a draft for {settings.preset}, got none: give --draft")
    return Models(
        name=settings.preset,
        target=dataclasses.replace(target, feature_layers=synthesizer.drafter.feature_layers),
        target_params=synthesizer.target_params,
        draft=draft,
        drafter=synthesizer.drafter.make,
        draft_params=synthesizer.drafter.params,
        groups=synthesizer.groups(synthesizer.threshold, "target"),
        requests=requests,
    )


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
