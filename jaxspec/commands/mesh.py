"""The options --mesh and --distributed, which the commands that run models share."""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxspec import mesh
from jaxspec.bench import presets
from jaxspec.checkpoint import descriptions
from jaxspec.common import hosts
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A command that may run on several chips."""

    mesh: str | None = dataclasses.field(default=None, kw_only=True)
    """Chips to use together: data=D,model=M divides the batch into D parts and the weights into M; auto uses all chips. By
    default one chip, and auto on several hosts."""
    distributed: bool = dataclasses.field(default=False, kw_only=True)
    """Join the other hosts of a TPU slice or a cluster, which run the same command; the first one reads, prints and writes."""

    def divided(self) -> str | Path | Config | None:
        """The target: a folder, the shape of a preset of the benchmark, or the built-in voice."""
        return None

    def on_mesh(self) -> AbstractContextManager[object]:
        """Sets the mesh that the option asks for.

        Raises:
            ValueError: there are fewer chips, or the option cannot be read.
        """
        if self.mesh is None and not hosts.several():
            return contextlib.nullcontext()
        if self.mesh not in (None, mesh.AUTO):
            return jax.set_mesh(mesh.make(*mesh.parse(self.mesh)))
        target = self.divided()
        if target is None or target == "builtin":  # the built-in voice is small
            return jax.set_mesh(mesh.make(data=jax.device_count()))
        shape = target if isinstance(target, Config) else _shape(target)
        return jax.set_mesh(presets.automatic_mesh(shape, target is shape))


def _shape(folder: str | Path) -> Config:
    """The shape of a model in the type that it is run in."""
    shape = descriptions.read_as(folder, Model).shape
    return dataclasses.replace(shape, dtype="float32" if jax.default_backend() == "cpu" else str(jnp.dtype(shape.dtype)))
