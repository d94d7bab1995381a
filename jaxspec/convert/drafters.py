"""Converts a published drafter for a target that is converted already, to a folder of kind "draft".

A family of published drafters is one function of ``convert.published`` and one row of ``pipeline.DRAFTERS``. What a file repeats
of its target is left out; where the copy differs, that is noted, as the drafter was trained for another target.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxspec.checkpoint import descriptions, pretrained, store
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.checkpoint.tensors import Tensor, cast
from jaxspec.common.trees import flatten
from jaxspec.convert.core import plan
from jaxspec.convert.pipeline import DRAFTERS, DTYPES, Converted, drafter_of, dtype_of
from jaxspec.convert.published import READERS
from jaxspec.convert.source import open_source
from jaxspec.draft import families
from jaxspec.models import transformer
from jaxspec.models.card import Model


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
    name = drafter_of(opened.tensors)
    if name is None:
        some = ", ".join(sorted(opened.tensors)[:3])
        raise ValueError(
            f"expected a drafter of {', '.join(DRAFTERS)}, got tensors {some} ...: leave --target out for other models"
        )
    reading = READERS[name](opened, model, Path(target))
    family = families.FAMILIES[reading.family]
    init = functools.partial(family.init_params, jax.random.key(0), reading.config)
    abstract = jax.eval_shape(init, transformer.abstract_params(model.shape))
    params, dropped = plan(reading.tensors, reading.rules, {path: leaf.shape for path, leaf in flatten(abstract).items()})
    kind = dtype_of(params, dtype)
    params = {path: cast(tensor, kind) for path, tensor in params.items()}
    settings, shared = families.to_json(reading.config), dict(family.shared(reading.config))
    files = tuple(path.name for path in opened.files)
    description = DraftDescription(reading.family, settings, model.digest, shared, source=opened.origin, files=files)
    notes = _compare(reading.copies, model, Path(target))
    written = pretrained.save(dest, description, params)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in params.values())
    return Converted(name, written.parameters, total, dropped, notes)


def _compare(copies: Mapping[str, Tensor], model: Model, folder: Path) -> list[str]:
    """A note for each of the target's arrays whose copy differs, unless the target's are int8.

    bfloat16 is compared, as either may be stored so.
    """
    if not copies or model.shape.int8:
        return []
    others = flatten(transformer.abstract_params(model.shape)).keys() - copies.keys()
    theirs = flatten(store.read_params(folder, "bfloat16", shared=dict.fromkeys(others, jax.numpy.zeros(0))))
    different = [
        tensor.name
        for path, tensor in copies.items()
        if not np.array_equal(cast(tensor, DTYPES["bfloat16"]).all(), np.asarray(theirs[path])[: tensor.shape[0]])
    ]
    return [f"{name} differs from the target's: trained for another target, the draft will guess less" for name in different]
