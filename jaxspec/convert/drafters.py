"""Converts a published drafter for a target that is converted already, to a folder of kind "draft".

A family of published drafters is one function, which gives the drafter's config and a table of rules. What a file repeats of its
target is left out; a drafter whose copy differs from the target is noted, as it was trained for another.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.checkpoint import descriptions, pretrained, store
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.checkpoint.tensors import Tensor, cast
from jaxspec.common.trees import flatten
from jaxspec.convert import llama
from jaxspec.convert.core import Rule, plan, transpose
from jaxspec.convert.pipeline import DRAFTERS, DTYPES, Converted
from jaxspec.convert.source import Source, open_source
from jaxspec.draft import families, mtp
from jaxspec.models import transformer
from jaxspec.models.card import Model


class Reading(NamedTuple):
    """What a family of published drafters makes of its files.

    Attributes:
        family: a name in ``jaxspec.draft.families.FAMILIES``.
        config: of the drafter.
        tensors: by the names that the rules know.
        rules: see ``core.Rule``.
        copies: tensors that repeat arrays of the target, by the paths of these; they are compared.
    """

    family: str
    config: Any
    tensors: Mapping[str, Tensor]
    rules: Sequence[Rule]
    copies: Mapping[str, Tensor]


def convert(
    source: str, dest: str | Path, target: str | Path, dtype: str | None = None, revision: str | None = None
) -> Converted:
    """Converts a published drafter into the new folder ``dest``, which is written atomically.

    Args:
        source: a directory, a weight file, or an id of the Hugging Face hub.
        dest: a folder that does not exist yet.
        target: the folder of the converted target.
        dtype: of the parameters, one of ``pipeline.DTYPES``; by default that of the files, but float32 for float16.
        revision: of the hub repository.

    Returns:
        What was written.

    Raises:
        ValueError: there is no drafter or no target, it is damaged (one line per problem), or ``dest`` exists.
        OSError: ``dest`` cannot be written, or the disk is full.
    """
    store.check_new(dest)  # before a download
    model = descriptions.read_as(target, Model)
    opened = open_source(source, revision)
    name = recognise(opened.tensors)
    reading = READERS[name](opened, model, Path(target))
    family = families.FAMILIES[reading.family]
    abstract = jax.eval_shape(lambda: family.init_params(jax.random.key(0), reading.config, {}))
    params, dropped = plan(reading.tensors, reading.rules, {path: leaf.shape for path, leaf in flatten(abstract).items()})
    own = "bfloat16" if all(tensor.dtype == DTYPES["bfloat16"] for tensor in params.values()) else "float32"
    params = {path: cast(tensor, DTYPES[dtype or own]) for path, tensor in params.items()}
    settings, shared = families.to_json(reading.config), dict(family.shared(reading.config))
    files = tuple(path.name for path in opened.files)
    description = DraftDescription(reading.family, settings, model.digest, shared, source=opened.origin, files=files)
    notes = _compare(reading.copies, model, Path(target))
    written = pretrained.save(dest, description, params)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in params.values())
    return Converted(name, written.parameters, total, dropped, notes)


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The family of a published drafter, by the names of its tensors.

    Raises:
        ValueError: it is none of ``pipeline.DRAFTERS``.
    """
    for name, mark in DRAFTERS.items():
        if mark in tensors:
            return name
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(f"expected a drafter of {', '.join(DRAFTERS)}, got tensors {some} ...: leave --target out for other models")


def _compare(copies: Mapping[str, Tensor], model: Model, folder: Path) -> list[str]:
    """A note for each of the target's arrays whose copy differs; bfloat16 is compared, as either may be stored so."""
    others = flatten(transformer.abstract_params(model.shape)).keys() - copies.keys()
    theirs = flatten(store.read_params(folder, "bfloat16", shared=dict.fromkeys(others, jax.numpy.zeros(0))))
    different = [
        tensor.name
        for path, tensor in copies.items()
        if not np.array_equal(cast(tensor, DTYPES["bfloat16"]).all(), np.asarray(theirs[path])[: tensor.shape[0]])
    ]
    return [f"{name} differs from the target's: trained for another target, the draft will guess less" for name in different]


def _layers(tensors: Mapping[str, Tensor], pattern: str, first: int = 0) -> tuple[dict[str, Tensor], list[int]]:
    """Renames tensors as transformers names those of a model's layers.

    Args:
        tensors: by name.
        pattern: of the layers' names, with a group for the number of the layer and one for what follows.
        first: the number of the first layer.

    Returns:
        All tensors, and the numbers of the layers, from 0.
    """
    renamed, found = {}, set()
    for name, tensor in tensors.items():
        if match := re.fullmatch(pattern, name):
            found.add(int(match[1]) - first)
            name = f"model.layers.{int(match[1]) - first}.{match[2]}"
        renamed[name] = tensor
    return renamed, sorted(found)


def _llasa_plus(opened: Source, model: Model, target: Path) -> Reading:
    """LLaSA+: frozen LLaSA with blocks of multi-token prediction, numbered from 1."""
    tensors, blocks = _layers(opened.tensors, r"mtp_(\d+)_block\.(.*)", first=1)
    own = [
        rule
        for i in range(len(blocks))
        for rule in (
            Rule(rf"mtp_{i + 1}_local_RMSNorm\.weight", f"input_norm_{i}/scale"),
            Rule(rf"mtp_{i + 1}_proj\.weight", f"project_{i}/kernel", transpose),
            Rule(rf"mtp_{i + 1}_proj\.bias", f"project_{i}/bias"),
        )
    ]
    rules = [*own, *llama.RULES, Rule(r"llm\..*", None)]
    norm = opened.tensors.get("llm.model.norm.weight")
    return Reading("mtp", mtp.Config(model.shape, len(blocks)), tensors, rules, {"norm/scale": norm} if norm else {})


READERS: dict[str, Callable[[Source, Model, Path], Reading]] = {"llasa-plus": _llasa_plus}
