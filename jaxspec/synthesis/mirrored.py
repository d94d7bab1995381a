"""Puts the draft of a target on devices of its own, as the option --mirror asks."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxspec import mesh, mirror
from jaxspec.checkpoint import descriptions
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.draft import families, smaller
from jaxspec.mirror import Mirror, Options
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.models.placement import Placement
from jaxspec.types import Draft, Params, Split


def draft_shape(folder: str | Path, dtype: str) -> transformer.Config | None:
    """The shape of the draft in a folder, computing in a dtype; None where it is no model of its own."""
    description = descriptions.read(folder)
    if isinstance(description, Model):
        return dataclasses.replace(description.shape, dtype=dtype)
    if not isinstance(description, DraftDescription) or families.FAMILIES[description.family] is not smaller:
        return None
    return smaller.shape(families.from_json(description.family, description.settings, dtype))


def mirrored(
    options: Options, target: transformer.Config, shape: transformer.Config | None, params: Params
) -> tuple[Callable[[Draft], Mirror], Params]:
    """What makes a mirror of a draft, and the draft's parameters on the last devices; the target is on the mesh that is set.

    Args:
        options: how many devices, candidates, and which exit.
        target: its shape.
        shape: the draft's; None where it is no model of its own.
        params: the draft's.

    Raises:
        ValueError: there is no such draft, there are too few devices, or the target has no such exit.
    """
    if shape is None:
        raise ValueError(mirror.NO_MODEL.format("none"))
    there, here = mirror.meshes(options.devices, (mesh.parts("batch"), mesh.parts("vocab")))
    split = transformer.split(target, options.exit_layer or target.layers // 2)
    placed = jax.device_put(params, transformer.shardings_of(shape, Placement(here), strict=False))
    return functools.partial(_mirror, split, options.candidates, (there, here)), placed


def _mirror(split: Split, candidates: int, meshes: tuple[Mesh, Mesh], draft: Draft) -> Mirror:
    return Mirror(split, draft, candidates, *meshes)
