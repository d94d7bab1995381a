"""The families of drafters that are trained for a target, by the names that their folders give them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxspec.common import records
from jaxspec.draft import block, eagle, medusa, mtp, recurrent, smaller, streaming
from jaxspec.draft.family import Family

FAMILIES: dict[str, Family] = {
    "model": smaller,
    "block": block,
    "recurrent": recurrent,
    "eagle": eagle,
    "medusa": medusa,
    "mtp": mtp,
    "streaming": streaming,
}


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
