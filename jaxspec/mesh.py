"""Meshes of devices: how one is made and named, and how arrays are divided over it within a compiled program.

A mesh has the axes "data", over which the rows of a batch are divided, and "model", over which the weights and the KV caches are
(tensor parallelism, arXiv 1909.08053). It is used by setting it: ``with jax.set_mesh(make(data=2, model=4)): generate(...)``. It
is part of the key of a compiled program, and without one, or on a mesh of one device, nothing here changes a program.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.types import Array

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

AXES = ("data", "model")
AUTO = "auto"
RULES = {"batch": "data", "vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model", "embed": None}
_WHOLE = {"heads": None, "kv_heads": None, "mlp": None}  # of a draft that every chip holds; its target's tables stay divided
_PART_BYTES = 2**27  # of weights, which a chip reads in about the time that the all-reduces of a step take

_rules: contextvars.ContextVar[Mapping[str, str | None]] = contextvars.ContextVar("rules", default=RULES)


def make(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for ``jax.set_mesh``, with axes of type Auto.

    The chips of a row of ``model`` are those of one host wherever a host has as many, as they talk in every layer.

    Args:
        data: parts of the batch.
        model: parts of the weights.
        devices: to choose from, the first ones are taken; by default all of JAX's.

    Raises:
        ValueError: there are fewer devices.

    >>> dict(make(data=1, model=1).shape)
    {'data': 1, 'model': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    if min(data, model) < 1 or data * model > len(devices):
        raise ValueError(
            f"expected a mesh of at most {len(devices)} chips, which there are, got data={data},model={model}: choose a smaller "
            "one (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of them)"
        )
    hosts: dict[int, list[Any]] = {}
    for device in devices:
        hosts.setdefault(device.process_index, []).append(device)
    rows = [host[: len(host) // model * model] for host in hosts.values()]
    if sum(map(len, rows)) < data * model:  # a row of the mesh spans hosts
        rows = [devices]
    parts, missing = [], data
    for row in rows:
        count = min(missing, len(row) // model)
        if count:
            parts.append(jax.make_mesh((count, model), AXES, (AxisType.Auto,) * 2, devices=row[: count * model]).devices)
        missing -= count
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 2)


def parse(text: str) -> tuple[int, int]:
    """The sizes D and M of a mesh from "data=D,model=M"; an axis that is not named has one part.

    Raises:
        ValueError: the text is something else.

    >>> parse("model=4")
    (1, 4)
    """
    parts = [re.fullmatch(r"(\w+)=([1-9]\d*)", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if not set(sizes) <= set(AXES) or len(sizes) < len(parts):
        raise ValueError(f"expected a mesh such as data=2,model=4, with the axes data and model, got {text!r}: write it so")
    return sizes.get("data", 1), sizes.get("model", 1)


def automatic(weight_bytes: int, divided: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices for a model.

    "model" is the largest number of chips that divides those of one host and every number of ``divided``, with 128 MiB of weights
    or more for each chip: reading fewer takes a step less time than the all-reduces that dividing them costs. The rest is "data".

    Args:
        weight_bytes: of the model.
        divided: its key/value heads, heads and vocabulary.
        devices: by default all of JAX's.
    """
    devices = list(jax.devices() if devices is None else devices)
    hosts = [device.process_index for device in devices]
    chips = min(map(hosts.count, hosts))
    fits = [m for m in range(1, chips + 1) if not any(n % m for n in (chips, *divided)) and weight_bytes >= m * _PART_BYTES]
    model = max(fits, default=1)
    return make(len(devices) // model, model, devices)


def current() -> Any:
    """The abstract mesh in context; None where there is none, or one of a single device, or within a ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto} else mesh


def rows() -> NamedSharding | None:
    """Where a batch from the host goes; None where there is no mesh: to JAX's default device."""
    return None if current() is None else NamedSharding(jax.sharding.get_mesh(), PartitionSpec(_rules.get()["batch"]))


def multiple(count: int) -> int:
    """The smallest multiple of the parts of a batch that is not below ``count``.

    >>> multiple(3)
    3
    """
    return -(-count // parts("batch")) * parts("batch")


def parts(axis: str) -> int:
    """Into how many parts the mesh in context divides a logical axis.

    >>> parts("batch")
    1
    """
    mesh, name = current(), _rules.get()[axis]
    return 1 if mesh is None or name is None else mesh.shape.get(name, 1)


def spec(shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """How an array is divided on the mesh in context, by the logical names of its axes, see ``RULES``.

    Axes that are None or left out are not divided, nor are those that the mesh does not divide evenly.
    """
    sizes = zip(axes, shape, strict=False)
    return PartitionSpec(*(_rules.get()[axis] if axis and parts(axis) > 1 and not n % parts(axis) else None for axis, n in sizes))


def constrain(x: Array, *axes: str | None) -> Array:
    """The array, divided on the mesh in context as ``spec`` says; unchanged where there is none."""
    return x if current() is None else jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def on_each(function: Callable[..., T], axes: Sequence[Sequence[str | None]], *arguments: Any) -> T:
    """``function(*arguments)``, on each chip for its own parts, so that nothing is sent between chips.

    Args:
        function: of trees of arrays; its result is a tree like the first argument.
        axes: the logical axes of the arrays of each argument.
        arguments: the trees.
    """
    if current() is None:
        return function(*arguments)
    specs = tuple(
        jax.tree.map(lambda leaf, names=names: spec(leaf.shape, *names), argument)
        for names, argument in zip(axes, arguments, strict=True)
    )
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def fetch(tree: T) -> T:
    """The arrays of a tree as numpy arrays, whole on every host. Call it at the same place on all hosts."""

    def gathered(leaf: Any) -> Any:
        here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def whole(function: F) -> F:
    """The function traced with heads and hidden widths undivided: for a model so small that every chip computes all of it."""

    @functools.wraps(function)
    def undivided(*arguments: Any, **named: Any) -> Any:
        with _using({**RULES, **_WHOLE}):
            return function(*arguments, **named)

    return undivided  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _using(rules: Mapping[str, str | None]) -> Iterator[None]:
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)
