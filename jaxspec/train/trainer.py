"""Trains a draft for a target by a recipe: samples in, a draft folder out, which appears when training has ended.

DRAFT.training/   training.json, log.jsonl, training.png, costs.json, checkpoints/, samples/ (made from texts),
                  features.npy (if asked for)
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3

from jaxspec import mesh
from jaxspec.checkpoint import pretrained, store
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.common import hosts, records
from jaxspec.common.files import claim, write_json
from jaxspec.draft import families
from jaxspec.draft.families import FAMILIES
from jaxspec.draft.family import Packed
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.synthesis.contract import Drafter, Settings
from jaxspec.train import acceptance, curves, drafts, features, losses, packing
from jaxspec.train import costs as costs_lib
from jaxspec.train import log as logs
from jaxspec.train import recipe as recipes
from jaxspec.train import samples as samples_lib
from jaxspec.train.costs import Costs
from jaxspec.train.drafts import Frozen, Task
from jaxspec.train.loop import Metrics, TrainConfig, data_mesh, fit
from jaxspec.train.recipe import Recipe
from jaxspec.train.samples import Samples
from jaxspec.train.speech import Target
from jaxspec.types import Params

_LONGEST = 8  # K up to which acceptance is measured
_EVALUATIONS = 20  # in a run
_LOGGED = 200  # rows of the log in a run
_CHECKPOINT = 250  # steps at most
_MEASURED_ANCHORS = 64  # of each packed row
_MEASURED_BATCHES = 8


class Trained(NamedTuple):
    """A finished draft: its description, and the last row of the log."""

    description: DraftDescription
    last: dict[str, Any]


def work_folder(out: Path) -> Path:
    """Where the checkpoints, the log and the picture of a draft are."""
    return out.with_name(f"{out.name}.training")


def begin(out: Path, recipe: Recipe, target: Target) -> Path:
    """Checks that a draft can be trained, and makes its work folder.

    Raises:
        ValueError: the draft exists, or the recipe does not fit the target.
        OSError: the folder cannot be made.
    """
    store.check_new(out)
    recipes.config(recipe, target.pretrained.model.shape)
    folder = work_folder(out)
    folder.mkdir(exist_ok=True)
    return folder


def train(
    out: Path,
    recipe: Recipe,
    target: Target,
    samples: Samples,
    sampling: Sampling,
    progress: Callable[[str], None] = print,
    cache_features: bool = False,
) -> Trained:
    """Trains a draft, resuming from the newest checkpoint in its work folder, and saves it.

    Args:
        out: the new folder of the draft.
        recipe: how it is trained.
        target: the model that it drafts for.
        samples: of the target, with prompts.
        sampling: how the target is sampled when the draft is used.
        progress: called with a line of text every now and then.
        cache_features: whether the target's hidden states are computed once and kept in the work folder.

    Returns:
        What was written.

    Raises:
        ValueError: the folder exists, or holds another training; there are too few samples; see ``loop.fit``.
        FloatingPointError: the loss is not finite.
        OSError: the disk is full.
    """
    work, model = begin(out, recipe, target), target.pretrained.model
    task = task_of(recipe, model.shape, sampling)
    _claim(work, recipe, model.digest, task.sampling, samples, cache_features)
    width = recipe.length or packing.row_length(samples)
    if cache_features:
        samples = features.cached(work, task, target.pretrained.params, samples, recipe.rows, width, progress)
    shown, held = samples_lib.split(samples)
    groups = target.synthesizer.groups(recipe.threshold or target.synthesizer.threshold, "target")
    frozen = Frozen(target.pretrained.params, losses.membership(groups))
    own = drafts.own_params(jax.random.key(recipe.seed), task, frozen.target)
    evaluate = _evaluation(task, frozen, held, recipe, width, _costs(work, task, own, target, held))
    progress(f"{len(shown.texts)} samples to train on, {len(held.texts)} held out, rows of {width} tokens")
    seen = fit(
        work,
        own,
        jax.tree_util.Partial(DraftLoss(task), frozen),
        lambda step: packing.batches(shown, recipe.rows, width, recipe.seed, step),
        config_of(recipe),
        progress,
        evaluate,
        curves.draw,
        data_mesh(),
    )
    family = FAMILIES[recipe.family]
    description = DraftDescription(
        family=recipe.family,
        settings=families.to_json(task.config),
        target=model.digest,
        shared=dict(family.shared(task.config)),
        licence=model.licence,
        source=f"trained by jaxspec for {model.family}: {recipe.loss}, {recipe.steps} steps",
    )
    seen = mesh.fetch(seen)
    saved, last = hosts.from_first(lambda: (dataclasses.asdict(pretrained.save(out, description, seen)), logs.read(work)[-1]))
    return Trained(records.from_json(DraftDescription, saved), last)


def task_of(recipe: Recipe, target: transformer.Config, sampling: Sampling) -> Task:
    """What a recipe asks for with a target.

    Raises:
        ValueError: they do not fit.
    """
    config = recipes.config(recipe, target)
    longest = FAMILIES[recipe.family].max_length(config)
    if longest is not None and recipe.block > longest:
        raise ValueError(f"expected a block of at most {longest} for this draft, got {recipe.block}: change the recipe")
    settings = losses.deployed(sampling)
    return Task(recipe.family, config, settings, recipe.loss, recipe.block, recipe.gamma, recipe.anchors, recipe.memory << 20)


def config_of(recipe: Recipe) -> TrainConfig:
    """Steps and rates of a recipe."""
    return TrainConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=max(1, round(recipe.warmup * recipe.steps)),
        decay_fraction=recipe.decay,
        ema_decay=recipe.ema,
        weight_decay=recipe.weight_decay,
        checkpoint_every=min(_CHECKPOINT, max(1, recipe.steps // _EVALUATIONS)),
        log_every=max(1, recipe.steps // _LOGGED),
        evaluate_every=max(1, recipe.steps // _EVALUATIONS),
        accumulate=recipe.accumulate,
        seed=recipe.seed,
    )


class DraftLoss:
    """The loss of a task; equal tasks are equal, so that a compiled program is used again."""

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, frozen: Frozen, own: Params, batch: Packed, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See ``drafts.loss``."""
        return drafts.loss(self.task, frozen, own, batch, key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DraftLoss) and self.task == other.task

    def __hash__(self) -> int:
        return hash(self.task)


def _claim(work: Path, recipe: Recipe, target: str, sampling: Sampling, samples: Samples, cache_features: bool) -> None:
    """Writes ``training.json``, or refuses a folder that another training was begun in."""
    asked = {
        **dataclasses.asdict(recipe),
        "target": target,
        "cache_features": cache_features,
        "sampling": dataclasses.asdict(sampling),
        "samples": f"blake3:{blake3(samples.tokens.tobytes() + samples.start.tobytes()).hexdigest()}",
    }
    claim(work / "training.json", asked, "use the same arguments to resume, or remove the folder")


def _costs(work: Path, task: Task, own: Params, target: Target, held: Samples) -> Costs:
    """The measured costs, kept in the work folder, so that a resumed run predicts from the same: those of the first host."""
    path = work / "costs.json"
    if kept := hosts.from_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None):
        return Costs(**kept)
    family, dtype = FAMILIES[task.family], jnp.dtype(task.config.target.dtype)
    params = drafts.full_params(task, jax.tree.map(lambda leaf: leaf.astype(dtype), own), target.pretrained.params)
    longest = measured_length(task)
    layers = family.feature_layers(task.config)
    drafter = Drafter(family.drafter(task.config), params, layers, family.max_length(task.config))
    requests = target.synthesizer.requests(held.texts[:1], Settings(voice=target.voices[0]))
    here = costs_lib.measure(target, drafter, requests, longest)
    costs = Costs(*hosts.from_first(lambda: here))
    write_json(path, costs._asdict())
    return costs


def measured_length(task: Task) -> int:
    """The largest K for which acceptance is measured."""
    return min(_LONGEST, FAMILIES[task.family].max_length(task.config) or _LONGEST)


def _evaluation(
    task: Task, frozen: Frozen, held: Samples, recipe: Recipe, width: int, costs: Costs
) -> Callable[[Params], Metrics]:
    """The function that measures a draft on the held-out samples."""
    batches = packing.held_out(held, recipe.rows, width)[:_MEASURED_BATCHES]
    anchors = [acceptance.windows(batch, _MEASURED_ANCHORS, recipe.seed + i) for i, batch in enumerate(batches)]

    def evaluate(own: Params) -> Metrics:
        places = zip(batches, anchors, strict=True)
        parts = [acceptance.measure(task, frozen, own, batch, measured_length(task), *at) for batch, at in places]
        parts = mesh.fetch(parts)
        rates, tokens = acceptance.by_position(parts), acceptance.tokens_per_round(parts)
        found: dict[str, Any] = {}
        for rule in rates:
            speed_up = costs.speed_up(tokens[rule])
            found |= {f"acceptance_{rule}": rates[rule], f"tokens_{rule}": tokens[rule], f"speed_up_{rule}": speed_up}
        return found | {"best_speed_up": np.max(found["speed_up_exact"])}

    return evaluate
