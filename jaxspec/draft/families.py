"""The families of drafters that are trained for a target, by the names that their folders give them; and where they live."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxspec.common import records
from jaxspec.draft import block, eagle, medusa, mtp, recurrent, smaller, streaming
from jaxspec.draft.family import Family
from jaxspec.models.placement import Placement

FAMILIES: dict[str, Family] = {
    "model": smaller,
    "block": block,
    "recurrent": recurrent,
    "eagle": eagle,
    "medusa": medusa,
    "mtp": mtp,
    "streaming": streaming,
}

# The families whose weights a mesh divides as those of their target: for a layer of its width two all-reduces take less time than
# reading all of its weights. The others are small, and every chip has all of them, see ``family.on_every_chip``.
_DIVIDED = ("model", "block", "eagle", "mtp")
_AXES = {
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


def shardings(family: str, config: Any, placement: Placement, shapes: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a drafter; what the mesh does not divide is replicated.

    Args:
        family: a name in ``FAMILIES``.
        config: of the drafter.
        placement: where its target is.
        shapes: the parameters or their shapes, by path.
    """
    shape = _shape(family, config)
    units = {"heads": shape.heads, "kv_heads": shape.kv_heads}
    axes = {path: _axes(family, path, len(leaf.shape)) for path, leaf in shapes.items()}
    return placement.params(axes, dict(shapes), units, strict=False)


def _shape(family: str, config: Any) -> Any:
    """The shape of a drafter's layers."""
    made = {"model": smaller.shape, "block": block.shape}
    return made[family](config) if family in made else config.target


def _axes(family: str, path: str, ndim: int) -> PartitionSpec:
    """The logical axes of a parameter, by the name of its projection."""
    parts = path.split("/")
    if parts[0].startswith("table_") or parts[-1] in ("head", "head_bias", "markov_following"):
        return PartitionSpec(*("vocab", "embed")[:ndim])
    if family not in _DIVIDED or len(parts) < 2 or parts[-2] not in _AXES:
        return PartitionSpec()
    axes = _AXES[parts[-2]]
    return PartitionSpec(*axes) if parts[-1] == "kernel" else PartitionSpec(axes[1])


def to_json(config: Any) -> dict[str, Any]:
    """A drafter's config as JSON values, the settings of its description."""
    return dataclasses.asdict(config)


def from_json(family: str, settings: Mapping[str, Any], dtype: str) -> Any:
    """A drafter's config from its JSON.

    Args:
        family: a name in ``FAMILIES``.
        settings: that ``to_json`` gave.
        dtype: the target's, to compute in.

    Raises:
        KeyError: there is no such family.
        ValueError: the settings are not those of the family.
    """
    target = {"target": {**settings["target"], "dtype": dtype}} if "target" in settings else {}
    return records.from_json(FAMILIES[family].Config, {**settings, **target})
