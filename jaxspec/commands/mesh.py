"""The option --mesh, which the commands that run models share."""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxspec import mesh
from jaxspec.bench import presets
from jaxspec.checkpoint import descriptions
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A command that may run on several chips."""

    mesh: str | None = dataclasses.field(default=None, kw_only=True)
    """Chips to use together: data=D,model=M divides the batch into D parts and the weights into M; auto uses all chips. By
    default one chip."""

    def divided(self) -> str | Path | None:
        """The target: a folder, a preset of the benchmark, or the built-in voice."""
        return None

    def on_mesh(self) -> AbstractContextManager[object]:
        """Sets the mesh that the option asks for.

        Raises:
            ValueError: there are fewer chips, or the option cannot be read.
        """
        if self.mesh is None:
            return contextlib.nullcontext()
        if self.mesh != mesh.AUTO:
            return jax.set_mesh(mesh.make(*mesh.parse(self.mesh)))
        shape = _shape(self.divided())
        if shape is None:
            return jax.set_mesh(mesh.make(data=jax.device_count()))
        return jax.set_mesh(mesh.automatic(presets.parameter_bytes(shape), (shape.kv_heads, shape.heads, shape.vocab)))


def _shape(model: str | Path | None) -> Config | None:
    """The shape of a model; None for the built-in voice, which is small."""
    if model is None or str(model) == "builtin":
        return None
    if str(model) in presets.PAIRS:
        return presets.pair(str(model), "bfloat16").target
    shape = descriptions.read_as(model, Model).shape
    return dataclasses.replace(shape, dtype="float32" if jax.default_backend() == "cpu" else str(jnp.dtype(shape.dtype)))
