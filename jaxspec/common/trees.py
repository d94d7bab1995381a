"""Nested dicts as flat ones, by path."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict by path.

    >>> flatten({"mlp": {"up": 1, "down": 2}})
    {'mlp/up': 1, 'mlp/down': 2}
    """
    return dict(traverse_util.flatten_dict(dict(tree), sep="/"))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of ``flatten``.

    >>> unflatten({"mlp/up": 1, "mlp/down": 2})
    {'mlp': {'up': 1, 'down': 2}}
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")
