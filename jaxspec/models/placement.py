"""Where arrays live: rules from logical axes to the axes of a device mesh, and the shardings that follow from them.

A mesh has the axes "data", over which the rows of a batch are divided, and "model", over which the weights and the KV caches are
(tensor parallelism, arXiv 1909.08053); the default is a mesh of one device.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.cache import KVCache

RULES = {"batch": "data", "vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model", "embed": None}


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices that a model runs on.

    Attributes:
        mesh: with axes among "data" and "model", of type Auto.

    Raises:
        ValueError: the mesh has another axis, or one of type Explicit.
    """

    mesh: Mesh

    def __post_init__(self) -> None:
        if not set(self.mesh.axis_names) <= {"data", "model"} or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(
                f'expected a mesh with Auto axes among "data" and "model", got {self.mesh.axis_names} of types '
                f"{self.mesh.axis_types}: make it with jax.make_mesh(..., axis_types=(AxisType.Auto, AxisType.Auto))"
            )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array by the logical names of its axes; None and missing axes are not divided."""
        names = [RULES[axis] if axis else None for axis in axes]
        return NamedSharding(self.mesh, PartitionSpec(*(name if name in self.mesh.axis_names else None for name in names)))

    def params(self, axes: Any, shapes: Any) -> Any:
        """The shardings of parameters.

        Args:
            axes: a tree of PartitionSpec with logical names, see ``transformer.logical_axes``.
            shapes: the parameters or their shapes, a tree of the same structure.

        Raises:
            ValueError: the mesh does not divide an axis.
        """
        return jax.tree.map(self._param, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def _param(self, axes: PartitionSpec, leaf: Any) -> NamedSharding:
        names = list(axes)
        for i, (name, size) in enumerate(zip(axes, leaf.shape, strict=False)):
            parts = self.mesh.shape.get(RULES[name], 1) if name and RULES[name] else 1
            if size % parts:
                if name != "kv_heads":
                    advice = f"convert with --pad-to {parts}" if name == "vocab" else "choose a mesh that divides it"
                    raise ValueError(f"expected {name} to be a multiple of {parts}, the model axis, got {size}: {advice}")
                names[i] = None  # few key/value heads are replicated
        return self.sharding(*names)

    def state(self, state: Any) -> Any:
        """The shardings of a tree of arrays with B as the leading axis: State, Request, KV caches, states of drafts."""

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, KVCache):
                return self.sharding("batch")
            heads = "kv_heads" if leaf.key.shape[1] % self.mesh.shape.get("model", 1) == 0 else None
            cells: Any = self.sharding("batch", heads, None, None)
            return KVCache(cells, cells)

        return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, KVCache))


def one_device(device: Any = None) -> Placement:
    """Everything on one device, by default the first."""
    devices = np.array([[device or jax.devices()[0]]])
    return Placement(Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)))
