"""The family of drafts that are transformers of their own: some layers of the target, or any smaller shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxspec import cache as kv
from jaxspec.common.trees import flatten, unflatten
from jaxspec.draft.family import TARGET, Packed, score, take
from jaxspec.draft.model import model_draft
from jaxspec.models import transformer
from jaxspec.models.int8 import dequantize
from jaxspec.types import Array, Draft, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """A transformer as a draft.

    Attributes:
        target: the target's shape.
        layers: the layers of the target that it starts from, in order; () for a ``shape`` of its own with random weights.
        shape: of a draft with ``layers`` = (); None: the target's with the layers that were chosen.
        trained: the first parts of the paths of what is trained, as "layer_0" or "head"; "" is everything. The rest are arrays
            of the target, and so need ``layers``. Int8 weights are not trained: of an int8 target, everything is trained, as
            floats, or nothing.

    Raises:
        ValueError: layers that the target lacks, both or neither of layers and shape, another vocabulary than the target's, or
            parts of an int8 target to be trained.
    """

    target: transformer.Config
    layers: tuple[int, ...] = ()
    shape: transformer.Config | None = None
    trained: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if bool(self.layers) == (self.shape is not None):
            raise ValueError(f"expected either layers or a shape, got {self.layers} and {self.shape}: give one of them")
        if any(not 0 <= i < self.target.layers for i in self.layers):
            raise ValueError(f"expected layers from 0 to {self.target.layers - 1}, got {self.layers}: choose among these")
        if self.shape and (self.shape.vocab, self.shape.input_tables) != (self.target.vocab, self.target.input_tables):
            raise ValueError(
                f"expected the vocabulary {self.target.vocab} of the target, got {self.shape.vocab}: use the target's"
            )
        if self.shape and self.trained != ("",):
            raise ValueError(f"expected a shape of its own to be trained as a whole, got trained={self.trained}: leave it out")
        if self.layers and self.target.int8 and self.trained not in ((), ("",)):
            raise ValueError(
                f"expected all or nothing of the layers of an int8 target to be trained, got trained={self.trained}: int8 "
                "weights are not trained, leave it out or convert the target without --weights int8"
            )


def shape(config: Config) -> transformer.Config:
    """The draft's own shape; it computes in the target's dtype."""
    if config.shape:
        return dataclasses.replace(config.shape, dtype=config.target.dtype, feature_layers=())
    weights = "float" if config.trained == ("",) else config.target.weights
    return dataclasses.replace(config.target, layers=len(config.layers), feature_layers=(), weights=weights)


def init_params(key: Array, config: Config, target_params: Params) -> Params:
    """The target's layers where ``config.layers`` names some, else random weights. The key is consumed."""
    if config.shape:
        return transformer.init_params(key, shape(config))
    start, frozen = flatten(target_params), shared(config)
    theirs = _paths(dataclasses.replace(shape(config), weights=config.target.weights))
    return dequantize(unflatten({path: start[_origin(config, path)] for path in theirs if path not in frozen}))


def shared(config: Config) -> Mapping[str, str]:
    """What is not trained."""
    if config.shape:
        return {}
    frozen = [path for path in _paths(shape(config)) if not path.startswith(config.trained)]
    return {path: _origin(config, path) for path in frozen}


def feature_layers(config: Config) -> tuple[int, ...]:
    """None: it reads tokens."""
    return ()


def max_length(config: Config) -> int | None:
    """Any."""
    return None


def drafter(config: Config) -> Callable[[int], Draft]:
    """K -> ``model_draft``."""
    return functools.partial(model_draft, transformer.language_model(shape(config)))


def logits(config: Config, params: Params, batch: Packed, features: Array | None, anchor: Array, length: int) -> Array:
    """The logits of one pass over the rows, at the anchors and the positions after them, see ``family.Family``."""
    own = shape(config)
    model = transformer.Transformer(dataclasses.replace(own, feature_layers=(own.layers,)))
    output: Any = model.apply({"params": params}, batch.tokens, segment=batch.segment)
    return score(own, {TARGET: params}, take(output[1], kv.span(anchor, length)))  # the head is applied to these only


def _paths(shape: transformer.Config) -> list[str]:
    """The paths of the parameters of a shape."""
    return list(flatten(transformer.abstract_params(shape)))


def _origin(config: Config, path: str) -> str:
    """Where the target holds what a subset of its layers holds at ``path``."""
    first, *rest = path.split("/")
    if first.startswith("layer_"):
        first = f"layer_{config.layers[int(first.removeprefix('layer_'))]}"
    return "/".join([first, *rest])
