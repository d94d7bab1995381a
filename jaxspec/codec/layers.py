"""Layers that the networks of codecs share: initializers with logical axes, linear layers, norms, an MLP, repetition."""

from typing import Any

import flax.linen as nn

from jaxspec.types import Array


def lecun(*axes: str | None) -> nn.initializers.Initializer:
    """LeCun's normal, for a kernel with these logical axes."""
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


def constant(value: float, axis: str | None) -> nn.initializers.Initializer:
    """A value for each index of a logical axis."""
    return nn.with_logical_partitioning(nn.initializers.constant(value), (axis,))


def linear(features: int, into: str | None, out: str | None, bias: bool = True, *, name: str) -> nn.Dense:
    """A linear layer whose kernel has these logical axes."""
    return nn.Dense(features, bias, kernel_init=lecun(into, out), bias_init=constant(0, out), name=name)


def layer_norm(eps: float, axis: str | None = "embed", affine: bool = True, *, name: str) -> nn.LayerNorm:
    """A layer norm; the fast variance, E[x^2] - E[x]^2, would lose digits to cancellation."""
    return nn.LayerNorm(
        eps,
        use_bias=affine,
        use_scale=affine,
        scale_init=constant(1, axis),
        bias_init=constant(0, axis),
        use_fast_variance=False,
        name=name,
    )


def repeated(layer: type[nn.Module], count: int, *axes: Any) -> Any:
    """A layer that is applied ``count`` times, with its parameters stacked on a first axis.

    Args:
        layer: its call takes what it changes and then other arguments, and returns what is changed, and None.
        count: of layers.
        axes: for each of the other arguments, ``nn.broadcast`` if every layer gets the same, or the axis with an entry for each.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=axes,  # pyright: ignore[reportArgumentType]
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class MLP(nn.Module):
    """down(silu(up(x)))."""

    hidden: int
    bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B T D] -> [B T D]."""
        y = nn.silu(linear(self.hidden, "embed", "mlp", self.bias, name="up")(x))
        return linear(x.shape[-1], "mlp", "embed", self.bias, name="down")(y)
