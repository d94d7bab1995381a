"""Where arrays live: the shardings that follow from a mesh and the logical axes of arrays, see ``jaxspec.mesh``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.cache import KVCache
from jaxspec.mesh import AXES, RULES, make
from jaxspec.sampling import BLOCK


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices that a model runs on.

    Attributes:
        mesh: with axes among "data" and "model", of type Auto; an abstract one serves for shapes.

    Raises:
        ValueError: the mesh has another axis, or one of type Explicit.
    """

    mesh: Mesh | AbstractMesh

    def __post_init__(self) -> None:
        if not set(self.mesh.axis_names) <= set(AXES) or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(
                f'expected a mesh with Auto axes among "data" and "model", got {self.mesh.axis_names} of types '
                f"{self.mesh.axis_types}: make it with jaxspec.mesh.make"
            )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array by the logical names of its axes; None and missing axes are not divided."""
        names = [RULES[axis] if axis else None for axis in axes]
        return NamedSharding(self.mesh, PartitionSpec(*(name if name in self.mesh.axis_names else None for name in names)))

    def params(self, axes: Any, shapes: Any, units: Mapping[str, int], strict: bool = True) -> Any:
        """The shardings of parameters.

        Args:
            axes: a tree of PartitionSpec with logical names, see ``transformer.logical_axes``.
            shapes: the parameters or their shapes, a tree of the same structure.
            units: how many heads there are, by logical name, as a head is not divided; other axes count by their size.
            strict: False: what the mesh does not divide is replicated. Key/value heads always are.

        Raises:
            ValueError: the mesh does not divide an axis.
        """

        def of(names: PartitionSpec, leaf: Any) -> NamedSharding:
            sizes = (units.get(name or "", size) for name, size in zip(names, leaf.shape, strict=False))
            return self.sharding(*(self._divided(name, size, strict) for name, size in zip(names, sizes, strict=True)))

        return jax.tree.map(of, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def _divided(self, name: str | None, size: int, strict: bool) -> str | None:
        """The name of an axis that is divided, or None."""
        parts = self.mesh.shape.get(RULES[name] or "", 1) if name else 1
        if not size % parts:
            return name
        if strict and name != "kv_heads":
            advice = f"convert with --pad-to {parts * BLOCK}" if name == "vocab" else "choose a mesh that divides it"
            raise ValueError(f"expected {name} to be a multiple of {parts}, the model axis, got {size}: {advice}")
        return None

    def state(self, state: Any) -> Any:
        """The shardings of a tree of arrays with B as the leading axis: State, Request, KV caches, states of drafts."""

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, KVCache):
                return self.sharding("batch")
            heads = "kv_heads" if leaf.key.shape[1] % self.mesh.shape.get("model", 1) == 0 else None
            cells: Any = self.sharding("batch", heads, None, None)
            return KVCache(cells, cells)

        return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, KVCache))


def current() -> Placement | None:
    """The placement on the mesh that ``jax.set_mesh`` has set; None where there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else Placement(mesh)


def abstract(data: int, model: int) -> Placement:
    """The placement on a mesh of these sizes without its devices, for shapes."""
    return Placement(AbstractMesh((data, model), AXES, axis_types=(AxisType.Auto, AxisType.Auto)))


def one_device(device: Any) -> Placement:
    """Everything on one device."""
    return Placement(make(devices=[device]))
